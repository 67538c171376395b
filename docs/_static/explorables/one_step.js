// Explorable of tutorial 1: one batch of plain descent, SAM, ASAM and SADT from a point the reader moves
(() => {
  const START = {point: [-.8, .3], rho: .25, lr: .08};
  const METHODS = Steps.methods.filter(m => m.key !== 'two');

  // The optimizer's steps in one batch of a method, and the climb to where its extra pass looks
  function linesOf({batch, color}, state) {
    const w = state.point;
    const {first, up, end} = batch(w, state);
    const before = first ?? w; // where the last step of the batch begins
    const lines = [{points: [before, end], color, kind: ''}];
    if (first) lines.push({points: [w, first], color, kind: ''});
    if (up) lines.push({points: [before, up], color, kind: 'climb'});
    return lines;
  }

  Parts.start('one_step', place => {
    const state = {...START};
    const endOf = method => method.batch(state.point, state).end;
    const controls = place.append('div').attr('class', 'controls');
    const range = {min: 0, max: .5, step: .01, value: START.rho};
    const rho = Parts.slider(controls, 'radius ρ', range, v => show({rho: v}));
    controls.append('button').text('back to the start').on('click', () => {
      rho.set(START.rho);
      state.rho = START.rho;
      map.moveTo(START.point);
    });
    const map = Plane.lossMap(place, START.point, point => show({point}));
    const columns = {
      'loss after': m => d3.format('.3f')(Steps.loss(endOf(m))),
      steps: m => m.steps,
      passes: m => m.passes,
    };
    const table = Parts.methodTable(place, METHODS, columns, () => show({}));
    place.select('thead tr').append('th'); // above the buttons
    table.rows.append('td').append('button').text('step').attr('aria-label', m => `step with ${m.name}`)
      .on('click', (e, m) => map.moveTo(endOf(m)));
    show({});

    function show(change) {
      Object.assign(state, change);
      table.fill();
      const chosen = table.chosen();
      map.draw(chosen.flatMap(m => linesOf(m, state)), chosen.map(m => ({...m, at: endOf(m)})));
    }
  });
})();
