// The loss of tutorial 1 and one batch of each method on it. docs/test_explorables.py compares every
// number with the library. A point w is [w1, w2]; `o` holds the learning rate `lr` and the radius `rho`.
const Steps = (() => {
  const add = (a, b, factor = 1) => [a[0] + factor * b[0], a[1] + factor * b[1]];
  const norm = g => Math.hypot(g[0], g[1]);

  const loss = ([w1, w2]) =>
    .2 + .2 * (w1 ** 2 - 1) ** 2 + .1 * w1 + .5 * (1 + 5 * (1 - w1) ** 2) * w2 ** 2;

  const slope = ([w1, w2]) => [
    .8 * w1 * (w1 ** 2 - 1) + .1 - 5 * (1 - w1) * w2 ** 2,
    (1 + 5 * (1 - w1) ** 2) * w2];

  // SADT compares predictions. The loss is half the sum of the squares of these three outputs, plus 0.0625.
  const curve = w1 => Math.sqrt(1 + 5 * (1 - w1) ** 2);
  const outputs = ([w1, w2]) => [
    Math.sqrt(.4) * (w1 ** 2 - 1.25), Math.sqrt(.2) * (w1 + .5), curve(w1) * w2];

  // The gradient at w of half the squared distance between the outputs at w and `target`
  function slopeOfDistance(w, target) {
    const [w1, w2] = w;
    const d = outputs(w).map((value, i) => value - target[i]);
    return [
      2 * Math.sqrt(.4) * w1 * d[0] + Math.sqrt(.2) * d[1] - 5 * (1 - w1) / curve(w1) * w2 * d[2],
      curve(w1) * d[2]];
  }

  // w + rho T² g / ||T g||, with T = 1 for SAM and T = |w| + 0.01 for ASAM
  function uphill(w, g, rho, sizes = [1, 1]) {
    const scaled = [sizes[0] * g[0], sizes[1] * g[1]];
    const factor = rho / (norm(scaled) + 1e-12);
    return [w[0] + factor * sizes[0] * scaled[0], w[1] + factor * sizes[1] * scaled[1]];
  }

  // Each method returns the points of one batch: `first` is the weights after a first optimizer step, `up`
  // is where the extra pass looks, `end` is the weights after the batch. `first` and `up` may be missing.
  const plain = (w, o) => ({end: add(w, slope(w), -o.lr)});

  function twoSteps(w, o) {
    const g = slope(w);
    const first = add(w, g, -o.lr);
    return {first, end: add(first, g, -o.lr)};
  }

  function sam(w, o) {
    const up = uphill(w, slope(w), o.rho);
    return {up, end: add(w, slope(up), -o.lr)};
  }

  function asam(w, o) {
    const up = uphill(w, slope(w), o.rho, w.map(v => Math.abs(v) + .01));
    return {up, end: add(w, slope(up), -o.lr)};
  }

  // The teacher stands at the distance rho uphill, as with `SADT(rho=...)`: the paper's noise is random.
  function sadt(w, o) {
    const g = slope(w);
    const first = add(w, g, -o.lr);
    const up = uphill(first, g, o.rho);
    const gAux = slopeOfDistance(up, outputs(w));
    return {first, up, end: add(first, add(g, gAux), -o.lr)};
  }

  // The cost of a batch, and colour (that of the library's figures) and shape in pictures
  const method = (key, name, batch, steps, passes, color, shape) =>
    ({key, name, batch, steps, passes, color, shape});
  const methods = [
    method('plain', 'plain descent', plain, 1, 1, '#7f7f7f', '●'),
    method('two', 'two plain steps', twoSteps, 2, 1, '#8c564b', '▼'),
    method('sam', 'SAM', sam, 1, 2, '#1f77b4', '■'),
    method('asam', 'ASAM', asam, 1, 2, '#17becf', '◆'),
    method('sadt', 'SADT', sadt, 2, 2, '#d62728', '▲')];

  return {loss, slope, outputs, methods};
})();
