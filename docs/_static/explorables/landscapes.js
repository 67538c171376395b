// Explorable of tutorial 7: the losses around three trained networks as surfaces, which the reader turns.
// docs/landscapes.json has the losses; docs/make_landscapes.py computes them with the library.
(() => {
  const START = {turn: 35, tilt: 45, log: true};
  const LOSSES = [.001, 10]; // the range of heights and colours

  // Where a point of the cube [-1, 1]² x [0, 1] lies in a picture: pixels across, pixels down, and distance
  function projection(width, height, view) {
    const [turn, tilt] = [view.turn, view.tilt].map(degrees => degrees * Math.PI / 180);
    const size = Math.min(width / 2.9, height / 2.7);
    const lift = .25 * Math.cos(tilt); // most of a surface lies above the middle of the range
    return (x, y, share) => {
      const right = x * Math.cos(turn) - y * Math.sin(turn);
      const away = x * Math.sin(turn) + y * Math.cos(turn);
      const z = 1.2 * (share - .5);
      const up = z * Math.cos(tilt) + away * Math.sin(tilt) - lift;
      return [width / 2 + size * right, height / 2 - size * up, away * Math.cos(tilt) - z * Math.sin(tilt)];
    };
  }

  // The four-cornered pieces of a surface, the farthest first, so that nearer ones cover them
  function pieces({at, loss}, project, share) {
    const points = loss.map((row, i) => row.map((v, j) => project(at[i], at[j], share(v))));
    const four = (rows, i, j) => [rows[i][j], rows[i][j + 1], rows[i + 1][j + 1], rows[i + 1][j]];
    const places = d3.range(at.length - 1);
    const found = d3.cross(places, places, (i, j) => ({
      corners: four(points, i, j),
      color: d3.color(d3.interpolateViridis(share(d3.mean(four(loss, i, j))))),
    }));
    return d3.sort(found, piece => -d3.sum(piece.corners, corner => corner[2]));
  }

  function draw(canvas, landscape, view) {
    const {clientWidth: width, clientHeight: height} = canvas;
    if (!width) return;
    canvas.width = width * devicePixelRatio;
    canvas.height = height * devicePixelRatio;
    const context = canvas.getContext('2d');
    context.scale(devicePixelRatio, devicePixelRatio);
    const project = projection(width, height, view);
    const share = (view.log ? d3.scaleLog : d3.scaleLinear)(LOSSES, [0, 1]).clamp(true);
    const outline = d3.line().curve(d3.curveLinearClosed).context(context);
    const paint = (fill, stroke, lineWidth) => {
      Object.assign(context, {fillStyle: fill, strokeStyle: stroke, lineWidth});
      context.fill();
      context.stroke();
    };
    for (const {corners, color} of pieces(landscape, project, share)) {
      context.beginPath();
      outline(corners);
      paint(color, color.darker(.8), .5);
    }
    // The point of the trained network, in the middle; a surface in front of it does not hide it.
    const [x, y] = project(0, 0, share(middle(landscape)));
    context.beginPath();
    context.arc(x, y, 4, 0, 2 * Math.PI);
    paint('#d62728', '#ffffff', 1.5);
  }

  function middle({loss}) {
    const i = (loss.length - 1) / 2;
    return loss[i][i];
  }

  // The mean loss at the border of the square
  function border({loss}) {
    const sides = loss.slice(1, -1).flatMap(row => [row[0], row.at(-1)]);
    return d3.mean([...loss[0], ...sides, ...loss.at(-1)]);
  }

  function numbers(landscape) {
    const [inside, outside] = [d3.format('.4f')(middle(landscape)), d3.format('.1f')(border(landscape))];
    return `: loss ${inside} at the network, ${outside} on average at the border`;
  }

  Parts.start('landscapes', (place, {landscapes}) => {
    const view = {...START};
    const controls = place.append('div').attr('class', 'controls');
    const degrees = {min: 0, step: 5, format: 'd'};
    const turn = Parts.slider(controls, 'turn', {...degrees, max: 360}, v => show({turn: v}));
    const tilt = Parts.slider(controls, 'tilt', {...degrees, max: 90}, v => show({tilt: v}));
    const label = controls.append('label');
    label.append('input').attr('type', 'checkbox').property('checked', view.log)
      .on('change', e => show({log: e.target.checked}));
    label.append('span').text(' logarithmic');
    const row = place.append('div').attr('class', 'views');
    const figures = row.selectAll('figure').data(landscapes).join('figure');
    const canvases = figures.append('canvas').attr('role', 'img')
      .attr('aria-label', landscape => landscape.name + numbers(landscape));
    const captions = figures.append('figcaption');
    captions.append('strong').text(landscape => landscape.name);
    captions.append('span').text(numbers);
    place.append('p').attr('class', 'hint').text(
      `Height and colour are the loss, from ${LOSSES.join(' to ')} in all three pictures. The red point is ` +
      `the trained network. Slice: ${landscapes[0].about}.`);
    // Sideways, the pointer turns all surfaces; up and down, it tilts them. A finger turns them only, because
    // up and down scrolls the page; with d3.drag a finger could not scroll it.
    let last = null;
    canvases.on('pointerdown', e => {
      last = e;
      e.target.setPointerCapture(e.pointerId);
    });
    canvases.on('pointermove', e => {
      if (!last) return;
      const down = e.pointerType === 'touch' ? 0 : e.clientY - last.clientY;
      const turn = view.turn + .6 * (e.clientX - last.clientX);
      const tilt = view.tilt + .4 * down;
      show({turn: (turn + 360) % 360, tilt: Math.min(90, Math.max(0, tilt))});
      last = e;
    });
    canvases.on('pointerup pointercancel', () => { last = null; });
    new ResizeObserver(() => show({})).observe(row.node());

    function show(change) {
      Object.assign(view, change);
      turn.set(view.turn);
      tilt.set(view.tilt);
      canvases.each((landscape, i, all) => draw(all[i], landscape, view));
    }
  });
})();
