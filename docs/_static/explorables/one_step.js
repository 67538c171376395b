// Explorable of tutorial 1: one batch of plain descent, SAM, ASAM and SADT from a point the reader moves
(() => {
  const START = {point: [-.8, .3], rho: .25, lr: .08};
  const METHODS = Steps.methods.filter(m => m.key !== 'two');
  const {html, number} = Parts;

  function drawBatch(map, w, method, o) {
    const batch = method.batch(w, o);
    const before = batch.first ?? w; // where the last step of the batch begins
    if (batch.first) map.line([w, batch.first], method.color);
    if (batch.up) map.line([before, batch.up], method.color, 'climb');
    map.line([before, batch.end], method.color);
    map.mark(batch.end, method);
  }

  // One row per method: its sign, the loss after the batch, the cost, and a button that makes the step.
  function table(parent, takeStep) {
    const box = html(parent, 'div', {class: 'scroll'});
    const all = html(box, 'table');
    const head = html(html(all, 'thead'), 'tr');
    for (const text of ['method', 'loss after', 'steps', 'passes', '']) {
      html(head, 'th', {scope: 'col'}, text);
    }
    const body = html(all, 'tbody');
    return METHODS.map(method => {
      const row = html(body, 'tr', {'data-method': method.key});
      const name = html(html(row, 'th', {scope: 'row'}), 'label');
      const shown = html(name, 'input', {type: 'checkbox'});
      shown.checked = true;
      Parts.sign(name, method);
      name.append(` ${method.name}`);
      const loss = html(row, 'td', {class: 'loss'});
      html(row, 'td', {}, method.steps);
      html(row, 'td', {}, method.passes);
      const named = {type: 'button', 'aria-label': `step with ${method.name}`};
      const button = html(html(row, 'td'), 'button', named, 'step');
      button.addEventListener('click', () => takeStep(method));
      return {method, shown, loss};
    });
  }

  Parts.start('one_step', place => {
    const o = {lr: START.lr, rho: START.rho};
    const controls = html(place, 'div', {class: 'controls'});
    const range = {min: 0, max: .5, step: .01, value: START.rho};
    const rho = Parts.slider(controls, 'radius ρ', range, v => {
      o.rho = v;
      refresh();
    });
    const reset = html(controls, 'button', {type: 'button'}, 'back to the start');
    let rows = [];
    const map = new Plane.LossMap(place, 'one-step', START.point, showLosses, draw);
    rows = table(place, method => map.moveTo(method.batch(map.point, o).end));
    rows.forEach(r => r.shown.addEventListener('change', refresh));
    reset.addEventListener('click', () => {
      o.rho = START.rho;
      rho.set(START.rho);
      map.moveTo(START.point);
    });
    showLosses(map.point);
    refresh();

    function draw(map) {
      for (const r of rows) {
        if (r.shown.checked) drawBatch(map, map.point, r.method, o);
      }
    }
    function showLosses(w) {
      for (const r of rows) r.loss.textContent = number(Steps.loss(r.method.batch(w, o).end), 3);
    }
    function refresh() {
      showLosses(map.point);
      map.update();
    }
  });
})();
