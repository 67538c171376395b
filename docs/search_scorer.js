// How Sphinx's search ranks pages: its own points, and what it cannot know about ours.
// Guides answer questions, so they come before pages of equal points; lists of everything come after them.
var Scorer = {
  score: result => {
    const [docname, , , , score] = result;
    if (docname.startsWith("guides/") && docname !== "guides/index") return score + 4;
    if (docname === "changelog" || docname === "api" || docname.endsWith("/index")) return score - 8;
    return score;
  },
  // the values that follow are those of Sphinx
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: {0: 15, 1: 5, 2: -5},
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
};
