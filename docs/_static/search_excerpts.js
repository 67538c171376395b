// Excerpts of search results come from the text of a page. Sphinx takes them from the theme's main element,
// which also has the menus and the list of contents, so that an excerpt began with these.
document.addEventListener('DOMContentLoaded', () => {
  if (typeof Search === 'undefined') return; // only the search page has it
  const mainText = Search.htmlToText;
  Search.htmlToText = (html, anchor) => {
    const page = new DOMParser().parseFromString(html, 'text/html');
    const article = page.querySelector('article');
    if (!article) return mainText(html, anchor);
    // the result's link is the title
    article.querySelectorAll('h1, .page-links').forEach(e => e.remove());
    return mainText(`<div role="main">${article.outerHTML}</div>`, anchor);
  };
});
