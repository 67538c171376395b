// Explorable of tutorial 1: a race of methods from one start. The reader chooses what is equal for all of
// them: batches, optimizer steps, or passes. A pass is one gradient; SAM, ASAM and SADT make two per batch.
(() => {
  const LENGTH = 150; // batches, steps or passes, whichever is equal
  const START = {point: [-.8, .3], rho: .25, lr: .08, unit: 'passes', t: LENGTH};
  const UNITS = ['batches', 'steps', 'passes'];
  const FLAT = [.9304029, 0];
  const NEAR = .2; // as far from the flat minimum, a method has reached it

  // The points of all batches of a method. The path ends where it leaves the neighbourhood of the map.
  function pathOf(method, state) {
    const path = [state.point];
    for (let i = 0; i < LENGTH; i++) {
      const w = method.batch(path[i], state).end;
      if (!(Math.hypot(...w) < 10)) break;
      path.push(w);
    }
    const reached = path.findIndex(w => Math.hypot(w[0] - FLAT[0], w[1] - FLAT[1]) < NEAR);
    return {path, diverged: path.length <= LENGTH, flatAfter: reached < 0 ? null : reached * method.passes};
  }

  // How far a runner is at the time `t`, counted in the chosen unit
  function standing(runner, {t, unit}) {
    const cost = unit === 'batches' ? 1 : runner[unit];
    const batches = Math.floor(t / cost);
    const points = runner.path.slice(0, batches + 1);
    const isOut = runner.diverged && batches >= runner.path.length;
    const loss = isOut ? 'diverges' : d3.format('.3f')(Steps.loss(points.at(-1)));
    return {points, batches, loss, at: points.at(-1)};
  }

  function sentence(runners) {
    const there = d3.sort(runners.filter(r => r.flatAfter !== null), r => r.flatAfter);
    if (!there.length) return 'No method reaches the flat minimum.';
    const each = there.map(r => `${r.name} after ${r.flatAfter} passes`);
    return `The flat minimum is reached by ${each.join(', ')}.`;
  }

  Parts.start('race', place => {
    const state = {...START};
    const runners = Steps.methods.map(m => ({...m, kind: 'trail'}));
    let timer = null;
    const controls = place.append('div').attr('class', 'controls');
    const run = controls.append('button').text('run').on('click', () => timer ? stop() : go());
    const range = {min: 0, max: LENGTH, step: 1, value: LENGTH, format: 'd'};
    const time = Parts.slider(controls, START.unit, range, t => {
      stop();
      show({t});
    });
    const choice = controls.append('fieldset');
    choice.append('legend').text('equal');
    const units = choice.selectAll('label').data(UNITS).join('label');
    units.append('input').attr('type', 'radio').attr('name', 'race-unit').attr('value', unit => unit)
      .property('checked', unit => unit === START.unit)
      .on('change', (e, unit) => {
        time.name(unit);
        show({unit});
      });
    units.append('span').text(unit => unit);
    const more = place.append('div').attr('class', 'controls');
    const rho = {min: .01, max: .5, step: .01, value: START.rho};
    const lr = {min: .01, max: .12, step: .01, value: START.lr};
    Parts.slider(more, 'radius ρ', rho, v => prepare({rho: v}));
    Parts.slider(more, 'learning rate', lr, v => prepare({lr: v}));
    const map = Plane.lossMap(place, START.point, point => prepare({point}));
    const columns = {
      steps: r => r.batches * r.steps,
      passes: r => r.batches * r.passes,
      loss: r => r.loss,
      'flat after': r => r.flatAfter ?? '–',
    };
    const table = Parts.methodTable(place, runners, columns, () => show({}));
    const status = place.append('p').attr('role', 'status');
    prepare({});

    // Compute all paths anew.
    function prepare(change) {
      Object.assign(state, change);
      for (const r of runners) Object.assign(r, pathOf(r, state));
      status.text(sentence(runners));
      show({});
    }
    function show(change) {
      Object.assign(state, change);
      for (const r of runners) Object.assign(r, standing(r, state));
      time.set(state.t);
      table.fill();
      map.draw(table.chosen(), table.chosen());
    }
    // Show the race in a few seconds; where the reader wants no motion, show its end at once.
    function go() {
      if (matchMedia('(prefers-reduced-motion: reduce)').matches) return show({t: LENGTH});
      if (state.t >= LENGTH) state.t = 0;
      run.text('pause');
      timer = setInterval(() => state.t < LENGTH ? show({t: state.t + 1}) : stop(), 40);
    }
    function stop() {
      clearInterval(timer);
      timer = null;
      run.text('run');
    }
  });
})();
