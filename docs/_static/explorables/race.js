// Explorable of tutorial 1: a race of methods from one start. The reader chooses what is equal for all of
// them: batches, optimizer steps, or passes. A pass is one gradient; SAM, ASAM and SADT make two per batch.
(() => {
  const LENGTH = 150; // batches, steps or passes, whichever is equal
  const START = {point: [-.8, .3], rho: .25, lr: .08};
  const UNITS = ['batches', 'steps', 'passes'];
  const FLAT = [.9304029, 0];
  const NEAR = .2; // as far from the flat minimum, a method has reached it
  const {html, number} = Parts;
  const cost = (method, unit) => unit === 'batches' ? 1 : method[unit];

  // The points of all batches of a method. The path ends where it leaves the neighbourhood of the map.
  function pathOf(method, start, o) {
    const path = [start];
    for (let i = 0; i < LENGTH; i++) {
      const w = method.batch(path[i], o).end;
      if (!(Math.hypot(...w) < 10)) break;
      path.push(w);
    }
    const reached = path.findIndex(w => Math.hypot(w[0] - FLAT[0], w[1] - FLAT[1]) < NEAR);
    return {path, diverged: path.length <= LENGTH, passes: reached < 0 ? null : reached * method.passes};
  }

  // Three buttons of which one is chosen: what is equal for all methods
  function unitChoice(parent, onChange) {
    const field = html(parent, 'fieldset');
    html(field, 'legend', {}, 'equal');
    for (const unit of UNITS) {
      const label = html(field, 'label');
      const input = html(label, 'input', {type: 'radio', name: 'race-unit', value: unit});
      input.checked = unit === 'passes';
      label.append(` ${unit}`);
      input.addEventListener('change', () => onChange(unit));
    }
  }

  function table(parent, onChange) {
    const all = html(html(parent, 'div', {class: 'scroll'}), 'table');
    const head = html(html(all, 'thead'), 'tr');
    for (const text of ['method', 'steps', 'passes', 'loss', 'flat after']) {
      html(head, 'th', {scope: 'col'}, text);
    }
    const body = html(all, 'tbody');
    return Steps.methods.map(method => {
      const row = html(body, 'tr', {'data-method': method.key});
      const name = html(html(row, 'th', {scope: 'row'}), 'label');
      const shown = html(name, 'input', {type: 'checkbox'});
      shown.checked = true;
      shown.addEventListener('change', onChange);
      Parts.sign(name, method);
      name.append(` ${method.name}`);
      const cells = ['steps', 'passes', 'loss', 'flat'].map(key => html(row, 'td', {class: key}));
      return {method, shown, cells};
    });
  }

  // What the race shows at the time `t`, counted in the chosen unit, for one row of the table
  function standing(row, t, unit) {
    const batches = Math.floor(t / cost(row.method, unit));
    const path = row.path.slice(0, batches + 1);
    const out = row.diverged && batches >= row.path.length;
    const end = path[path.length - 1];
    return {path, end, batches, loss: out ? 'diverges' : number(Steps.loss(end), 3)};
  }

  function sentence(rows) {
    const there = rows.filter(r => r.passes !== null).sort((a, b) => a.passes - b.passes);
    if (!there.length) return 'No method reaches the flat minimum.';
    const each = there.map(r => `${r.method.name} after ${r.passes} passes`);
    return `The flat minimum is reached by ${each.join(', ')}.`;
  }

  Parts.start('race', place => {
    const state = {lr: START.lr, rho: START.rho, unit: 'passes', t: LENGTH, timer: null};
    const controls = html(place, 'div', {class: 'controls'});
    const run = html(controls, 'button', {type: 'button'}, 'run');
    const range = {min: 0, max: LENGTH, step: 1, value: LENGTH, digits: 0};
    const time = Parts.slider(controls, 'passes', range, t => {
      stop();
      state.t = t;
      map.update();
    });
    const timeName = time.input.previousSibling;
    unitChoice(controls, unit => {
      state.unit = unit;
      timeName.textContent = unit;
      map.update();
    });
    const more = html(place, 'div', {class: 'controls'});
    const rho = {min: .01, max: .5, step: .01, value: START.rho};
    const lr = {min: .01, max: .12, step: .01, value: START.lr};
    Parts.slider(more, 'radius ρ', rho, v => prepare({rho: v}));
    Parts.slider(more, 'learning rate', lr, v => prepare({lr: v}));
    let rows = [];
    const map = new Plane.LossMap(place, 'race', START.point, () => prepare({}), draw);
    rows = table(place, () => map.update());
    const status = html(place, 'p', {role: 'status'});
    run.addEventListener('click', () => state.timer ? stop() : go());
    prepare({});

    // Compute all paths anew.
    function prepare(change) {
      Object.assign(state, change);
      for (const row of rows) Object.assign(row, pathOf(row.method, map.point, state));
      status.textContent = sentence(rows);
      map.update();
    }
    function draw(map) {
      for (const row of rows) {
        const now = standing(row, state.t, state.unit);
        const counts = [now.batches * row.method.steps, now.batches * row.method.passes];
        [...counts, now.loss, row.passes ?? '–'].forEach((text, i) => { row.cells[i].textContent = text; });
        if (!row.shown.checked) continue;
        map.line(now.path, row.method.color, 'trail');
        map.mark(now.end, row.method);
      }
    }
    function show(t) {
      state.t = t;
      time.set(t);
      map.update();
    }
    // Show the race in a few seconds; where the reader wants no motion, show its end at once.
    function go() {
      if (matchMedia('(prefers-reduced-motion: reduce)').matches) return show(LENGTH);
      if (state.t >= LENGTH) state.t = 0;
      run.textContent = 'pause';
      state.timer = setInterval(() => state.t < LENGTH ? show(state.t + 1) : stop(), 40);
    }
    function stop() {
      clearInterval(state.timer);
      state.timer = null;
      run.textContent = 'run';
    }
  });
})();
