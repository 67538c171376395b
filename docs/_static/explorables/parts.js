// What several explorables are made of: sliders, the table of methods, and the start.
// `parent` and `place` are selections of D3.
const Parts = (() => {
  // A labelled slider; `onInput` gets its value.
  function slider(parent, name, o, onInput) {
    const label = parent.append('label').attr('class', 'slider');
    const title = label.append('span').text(name);
    const input = label.append('input').attr('type', 'range')
      .attr('min', o.min).attr('max', o.max).attr('step', o.step);
    const shown = label.append('span').attr('class', 'value')
      .attr('aria-hidden', true); // the slider says it itself
    const value = () => input.property('valueAsNumber');
    const show = () => shown.text(d3.format(o.format ?? '.2f')(value()));
    const set = v => {
      input.property('value', v);
      show();
    };
    input.on('input', () => {
      show();
      onInput(value());
    });
    set(o.value);
    return {set, name: text => title.text(text)};
  }

  // One row per method with its sign, and a checkbox that says whether the map shows the method. `columns`
  // has the name of each other column, and what it says of a method whenever the table is filled.
  function methodTable(parent, methods, columns, onChoice) {
    const names = Object.keys(columns);
    const table = parent.append('div').attr('class', 'scroll').append('table');
    table.append('thead').append('tr').selectAll('th').data(['method', ...names])
      .join('th').attr('scope', 'col').text(name => name);
    const rows = table.append('tbody').selectAll('tr').data(methods)
      .join('tr').attr('data-method', m => m.key);
    const labels = rows.append('th').attr('scope', 'row').append('label');
    const boxes = labels.append('input').attr('type', 'checkbox').property('checked', true)
      .on('change', onChoice);
    labels.append('svg').attr('class', 'sign').attr('aria-hidden', true).append('text').attr('class', 'mark')
      .attr('x', 8).attr('y', 14).attr('fill', m => m.color).text(m => m.shape);
    labels.append('span').text(m => m.name);
    const cells = rows.selectAll('td').data(m => names.map(name => ({name, text: () => columns[name](m)})))
      .join('td').attr('class', cell => cell.name);
    return {
      rows,
      fill: () => cells.text(cell => cell.text()),
      chosen: () => boxes.filter(':checked').data(),
    };
  }

  // Fill the place of an explorable on this page, if there is one, and hide the still picture above it.
  function start(name, fill) {
    const place = d3.select(`[data-explorable="${name}"]`);
    if (place.empty()) return;
    const data = d3.select(`#data-${name}`);
    place.property('hidden', false);
    fill(place, data.empty() ? null : JSON.parse(data.text()));
    d3.selectAll(`.tag_still_${name} .cell_output`).property('hidden', true);
  }

  return {slider, methodTable, start};
})();
