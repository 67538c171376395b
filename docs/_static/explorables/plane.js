// A map of the loss with a point that is moved by hand: by mouse, by finger, or with the arrow keys.
// Used by one_step.js and race.js.
const Plane = (() => {
  const RANGE = {w1: [-1.6, 1.6], w2: [-.8, .8]};
  const LEVELS = [.1, .15, .2, .25, .3, .35, .4, .5, .7, 1, 1.5, 2.2, 3.2, 5, 8];
  const GRID = [160, 80]; // columns and rows of the points at which the loss is computed
  const MARGIN = {left: 34, bottom: 38};
  const MINIMA = [
    {name: 'sharp', w1: -1.0574538, color: '#b22222'},
    {name: 'flat', w1: .9304029, color: '#2e8b57'}];
  const clamp = (v, [low, high]) => Math.min(high, Math.max(low, v));

  // For each level the area in which the loss is lower. D3 looks for higher values, hence the signs.
  function areas() {
    const w1 = d3.scaleLinear([0, GRID[0]], RANGE.w1);
    const w2 = d3.scaleLinear([GRID[1], 0], RANGE.w2);
    const points = d3.cross(d3.range(GRID[1]), d3.range(GRID[0]), (i, j) => [w1(j + .5), w2(i + .5)]);
    const contours = d3.contours().size(GRID).thresholds(LEVELS.map(level => -level));
    return contours(points.map(w => -Steps.loss(w)));
  }

  // Add the map to `parent`. `onMove` gets the point whenever it moves; `draw` shows lines and marks.
  function lossMap(parent, start, onMove) {
    let point = start;
    let shown = {lines: [], marks: []};
    const x = d3.scaleLinear().domain(RANGE.w1);
    const y = d3.scaleLinear().domain(RANGE.w2);
    const path = d3.line(w => x(w[0]), w => y(w[1]));

    const box = parent.append('div').attr('class', 'plane');
    const all = box.append('svg').append('g').attr('transform', `translate(${MARGIN.left} 0)`);
    const frame = all.append('svg'); // an inner svg hides what lies outside of it
    const ground = frame.append('g').attr('class', 'levels');
    ground.selectAll('path').data(areas()).join('path').attr('d', d3.geoPath());
    const minima = frame.selectAll('g.minimum').data(MINIMA).join('g').attr('class', 'minimum');
    minima.append('circle').attr('r', 5).attr('fill', m => m.color);
    minima.append('text').attr('class', 'halo').attr('y', 19).text(m => m.name);
    const lineLayer = frame.append('g').attr('class', 'lines');
    const markLayer = frame.append('g');

    const across = all.append('g');
    const upward = all.append('g');
    const title = across.append('text').attr('y', 33).text('weight w₁');
    upward.append('text').attr('x', -9).attr('y', 12).text('w₂');

    const handle = all.append('g').attr('class', 'handle').attr('tabindex', 0).attr('role', 'slider')
      .attr('aria-roledescription', 'point on a map')
      .attr('aria-label', 'the weights; the arrow keys move them')
      .attr('aria-valuemin', RANGE.w1[0]).attr('aria-valuemax', RANGE.w1[1]);
    handle.append('circle').attr('r', 22).attr('class', 'touch');
    handle.append('circle').attr('r', 8).attr('class', 'ring');
    handle.on('keydown', onKey).call(d3.drag()
      .subject(() => ({x: x(point[0]), y: y(point[1])}))
      .on('drag', e => moveTo([x.invert(e.x), y.invert(e.y)])));

    new ResizeObserver(resize).observe(box.node());
    resize();
    return {draw, moveTo};

    function resize() {
      const width = box.node().clientWidth - MARGIN.left;
      const height = box.node().clientHeight - MARGIN.bottom;
      if (width <= 0) return;
      x.range([0, width]);
      y.range([height, 0]);
      frame.attr('width', width).attr('height', height);
      ground.attr('transform', `scale(${width / GRID[0]} ${height / GRID[1]})`);
      minima.attr('transform', m => `translate(${x(m.w1)} ${y(0)})`);
      across.attr('transform', `translate(0 ${height})`).call(d3.axisBottom(x).ticks(7).tickSizeOuter(0));
      upward.call(d3.axisLeft(y).ticks(3).tickSizeOuter(0));
      title.attr('x', x(0));
      placeHandle();
      draw(shown.lines, shown.marks);
    }

    function onKey(e) {
      const by = e.shiftKey ? .1 : .02;
      const moves = {ArrowLeft: [-by, 0], ArrowRight: [by, 0], ArrowUp: [0, by], ArrowDown: [0, -by]};
      const move = moves[e.key];
      if (!move) return;
      e.preventDefault(); // the page would scroll
      moveTo([point[0] + move[0], point[1] + move[1]]);
    }

    // Move the point to the nearest place on the map.
    function moveTo(w) {
      point = [clamp(w[0], RANGE.w1), clamp(w[1], RANGE.w2)];
      placeHandle();
      onMove(point);
    }

    function placeHandle() {
      const [w1, w2] = point.map(d3.format('.2f'));
      const loss = d3.format('.3f')(Steps.loss(point));
      handle.attr('transform', `translate(${x(point[0])} ${y(point[1])})`)
        .attr('aria-valuenow', point[0].toFixed(2))
        .attr('aria-valuetext', `w1 ${w1}, w2 ${w2}, loss ${loss}`);
    }

    // A line has `points`, a `color` and a `kind`; below it lies a broader one in the page's colour.
    // A mark has its place `at`, a `shape` and a `color`.
    function draw(lines, marks) {
      shown = {lines, marks};
      const below = line => ({...line, kind: `below ${line.kind}`, color: null});
      lineLayer.selectAll('path').data(lines.flatMap(line => [below(line), line])).join('path')
        .attr('class', line => line.kind)
        .attr('stroke', line => line.color)
        .attr('d', line => path(line.points));
      markLayer.selectAll('text').data(marks).join('text')
        .attr('class', 'halo mark')
        .attr('fill', mark => mark.color)
        .attr('x', mark => x(mark.at[0]))
        .attr('y', mark => y(mark.at[1]) + 5)
        .text(mark => mark.shape);
    }
  }

  return {lossMap};
})();
