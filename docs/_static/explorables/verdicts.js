// The filter of the verdicts: the claims of a paper, with a verdict, or about a method. docs/explorables.py
// writes the data into the page. Each claim is one line, which opens to its evidence.
(() => {
  const {html} = Parts;
  const MARKS = {
    'reproduced': '✓', 'reproduced in part': '◐', 'not reproduced, open': '○',
    'not reproduced, contradicted': '✗', 'not decidable here': '–'};
  const FILTERS = [
    {key: 'paper', all: 'all papers', of: claim => [claim.paper]},
    {key: 'verdict', all: 'all verdicts', of: claim => [claim.verdict]},
    {key: 'method', all: 'all methods', of: claim => claim.methods}];

  // A list of choices; `data.choices` gives their order.
  function menu(parent, filter, data, onChange) {
    const label = html(parent, 'label', {class: 'menu'});
    html(label, 'span', {}, filter.key);
    const select = html(label, 'select');
    html(select, 'option', {value: ''}, filter.all);
    for (const choice of data.choices[filter.key]) html(select, 'option', {value: choice}, choice);
    select.addEventListener('change', onChange);
    return select;
  }

  // The evidence of one place: where it was measured, and each comparison
  function addPlace(list, place) {
    const item = html(list, 'li');
    if (place.control) html(item, 'strong', {}, 'Control. ');
    if (place.page) html(item, 'a', {href: place.page}, place.name);
    else item.append(place.name);
    item.append(place.aside ? ` (without effect on the verdict): ` : ': ');
    item.append(`${place.count}; ${place.found.join('; ')}`);
  }

  function addClaim(list, claim) {
    const item = html(list, 'li', {'data-verdict': claim.verdict});
    const details = html(item, 'details');
    const summary = html(details, 'summary');
    html(summary, 'span', {class: 'verdict'}, `${MARKS[claim.verdict]} ${claim.verdict}`);
    summary.append(` ${claim.says}`);
    html(details, 'p', {class: 'hint'}, `${claim.paper}: ${claim.where}`);
    if (claim.need) html(details, 'p', {}, `Missing: ${claim.need}`);
    const places = html(details, 'ul');
    for (const place of claim.places) addPlace(places, place);
  }

  Parts.start('verdicts', (place, data) => {
    const controls = html(place, 'div', {class: 'controls'});
    const menus = FILTERS.map(filter => menu(controls, filter, data, show));
    const reset = html(controls, 'button', {type: 'button'}, 'show all');
    const status = html(place, 'p', {role: 'status'});
    const list = html(place, 'ul', {class: 'claims'});
    reset.addEventListener('click', () => {
      for (const m of menus) m.value = '';
      show();
    });
    show();

    function isChosen(claim) {
      return FILTERS.every((filter, i) => !menus[i].value || filter.of(claim).includes(menus[i].value));
    }
    function show() {
      const chosen = data.claims.filter(isChosen);
      const reproduced = chosen.filter(claim => claim.verdict === 'reproduced').length;
      status.textContent =
        `${chosen.length} of ${data.claims.length} claims, ${reproduced} of them reproduced. ` +
        'Each line opens to its evidence.';
      list.replaceChildren();
      for (const claim of chosen) addClaim(list, claim);
    }
  });
})();
