// The filter of the verdicts: it shows the claims of a paper, with an outcome, or about a method. The claims
// are rows of the page itself, which open to their evidence; without scripts all of them are shown.
(() => {
  const {html} = Parts;
  const FILTERS = [
    {key: 'paper', all: 'all papers'},
    {key: 'outcome', all: 'all outcomes'},
    {key: 'method', all: 'all methods'}];

  // A list of choices, in the order in which they first appear on the page
  function menu(parent, filter, rows, onChange) {
    const label = html(parent, 'label', {class: 'menu'});
    html(label, 'span', {}, filter.key);
    const select = html(label, 'select');
    html(select, 'option', {value: ''}, filter.all);
    for (const choice of new Set(rows.map(row => row.dataset[filter.key])))
      html(select, 'option', {value: choice}, choice);
    select.addEventListener('change', onChange);
    return select;
  }

  Parts.start('verdicts', place => {
    const rows = [...document.querySelectorAll('details.claim')];
    const controls = html(place, 'div', {class: 'controls'});
    const menus = FILTERS.map(filter => menu(controls, filter, rows, show));
    const reset = html(controls, 'button', {type: 'button'}, 'show all');
    const status = html(place, 'p', {role: 'status'});
    reset.addEventListener('click', () => {
      for (const m of menus) m.value = '';
      show();
    });
    show();

    function isChosen(row) {
      return FILTERS.every((filter, i) => !menus[i].value || row.dataset[filter.key] === menus[i].value);
    }
    function show() {
      for (const row of rows) row.hidden = !isChosen(row);
      const chosen = rows.filter(row => !row.hidden).length;
      const count = `${chosen} of ${rows.length} claims are shown below.`;
      status.textContent = `${count} Each row opens to its evidence.`;
    }
  });
})();
