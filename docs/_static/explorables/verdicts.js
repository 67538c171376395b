// The filter of the verdicts: it shows the claims of a paper, with an outcome, or about a method. The claims
// are rows of the page itself, which open to their evidence; without scripts all of them are shown.
Parts.start('verdicts', place => {
  const rows = d3.selectAll('details.claim');
  const controls = place.append('div').attr('class', 'controls');
  const labels = controls.selectAll('label').data(['paper', 'outcome', 'method'])
    .join('label').attr('class', 'menu');
  labels.append('span').text(key => key);
  const menus = labels.append('select').on('change', show);
  menus.append('option').attr('value', '').text(key => `all ${key}s`);
  // The choices stand in the order in which they first appear on the page.
  menus.selectAll('.choice').data(key => new Set(rows.nodes().map(row => row.dataset[key])))
    .join('option').attr('class', 'choice').attr('value', choice => choice).text(choice => choice);
  controls.append('button').text('show all').on('click', () => {
    menus.property('value', '');
    show();
  });
  const status = place.append('p').attr('role', 'status');
  show();

  function show() {
    const hides = (menu, row) => menu.value && row.dataset[d3.select(menu).datum()] !== menu.value;
    rows.property('hidden', (d, i, all) => menus.nodes().some(menu => hides(menu, all[i])));
    const count = rows.filter(':not([hidden])').size();
    status.text(`${count} of ${rows.size()} claims are shown below. Each row opens to its evidence.`);
  }
});
