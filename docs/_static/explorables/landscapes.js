// Explorable of tutorial 7: the losses around three trained networks as surfaces, which the reader turns.
// docs/landscapes.json has the losses; docs/make_landscapes.py computes them with the library.
(() => {
  const START = {turn: 35, tilt: 45, log: true};
  const LOSSES = [.001, 10]; // the range of heights and colours
  const COLORS = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]]; // viridis
  const {html, number} = Parts;
  const radians = degrees => degrees * Math.PI / 180;
  const clamp = (v, low, high) => Math.min(high, Math.max(low, v));

  // Where a loss lies in the range, from 0 to 1
  function share(loss, log) {
    const [low, high] = LOSSES;
    const v = log ? Math.log(loss / low) / Math.log(high / low) : (loss - low) / (high - low);
    return clamp(v, 0, 1);
  }

  function color(v) {
    const place = v * (COLORS.length - 1);
    const i = Math.min(COLORS.length - 2, Math.floor(place));
    return COLORS[i].map((c, k) => Math.round(c + (place - i) * (COLORS[i + 1][k] - c)));
  }

  // A function from a point of the cube [-1, 1]² x [0, 1] to the picture: right, up, and distance
  function projection(view) {
    const [a, b] = [radians(view.turn), radians(view.tilt)];
    return (x, y, height) => {
      const right = x * Math.cos(a) - y * Math.sin(a);
      const away = x * Math.sin(a) + y * Math.cos(a);
      const z = 1.2 * (height - .5);
      return [right, z * Math.cos(b) + away * Math.sin(b), away * Math.cos(b) - z * Math.sin(b)];
    };
  }

  // The four-cornered pieces of a surface, the farthest first, so that nearer ones cover them
  function pieces(landscape, view) {
    const project = projection(view);
    const {at, loss} = landscape;
    const points = loss.map((row, i) => row.map((v, j) => project(at[i], at[j], share(v, view.log))));
    const found = [];
    for (let i = 0; i + 1 < at.length; i++) {
      for (let j = 0; j + 1 < at.length; j++) {
        const corners = [points[i][j], points[i][j + 1], points[i + 1][j + 1], points[i + 1][j]];
        const mean = (loss[i][j] + loss[i][j + 1] + loss[i + 1][j + 1] + loss[i + 1][j]) / 4;
        const away = corners.reduce((sum, c) => sum + c[2], 0);
        found.push({corners, away, color: color(share(mean, view.log))});
      }
    }
    return found.sort((p, q) => q.away - p.away);
  }

  function draw(canvas, landscape, view) {
    const width = canvas.clientWidth;
    const height = canvas.clientHeight;
    if (!width) return;
    canvas.width = width * devicePixelRatio;
    canvas.height = height * devicePixelRatio;
    const context = canvas.getContext('2d');
    context.scale(devicePixelRatio, devicePixelRatio);
    const scale = Math.min(width / 2.9, height / 2.7);
    const lift = .25 * Math.cos(radians(view.tilt)); // most of a surface lies above the middle of the range
    const pixel = ([right, up]) => [width / 2 + scale * right, height / 2 - scale * (up - lift)];
    context.lineWidth = .5;
    for (const piece of pieces(landscape, view)) {
      context.beginPath();
      for (const corner of piece.corners) context.lineTo(...pixel(corner));
      context.closePath();
      context.fillStyle = `rgb(${piece.color})`;
      context.strokeStyle = `rgb(${piece.color.map(c => Math.round(.75 * c))})`;
      context.fill();
      context.stroke();
    }
    drawNetwork(context, pixel(projection(view)(0, 0, share(middle(landscape), view.log))));
  }

  // The point of the trained network, in the middle; a surface in front of it does not hide it.
  function drawNetwork(context, [x, y]) {
    context.beginPath();
    context.arc(x, y, 4, 0, 2 * Math.PI);
    context.fillStyle = '#d62728';
    context.strokeStyle = '#ffffff';
    context.lineWidth = 1.5;
    context.fill();
    context.stroke();
  }

  function middle(landscape) {
    const i = (landscape.at.length - 1) / 2;
    return landscape.loss[i][i];
  }

  // The mean loss at the border of the square
  function border(landscape) {
    const last = landscape.at.length - 1;
    const isBorder = (i, j) => i === 0 || j === 0 || i === last || j === last;
    const values = landscape.loss.flatMap((row, i) => row.filter((v, j) => isBorder(i, j)));
    return values.reduce((sum, v) => sum + v, 0) / values.length;
  }

  // Sideways, the pointer turns all surfaces; up and down, it tilts them. On a phone a finger turns them
  // only, because up and down scrolls the page.
  function turnByHand(canvas, view, show) {
    let last = null;
    canvas.addEventListener('pointerdown', e => {
      last = [e.clientX, e.clientY];
      canvas.setPointerCapture(e.pointerId);
    });
    canvas.addEventListener('pointermove', e => {
      if (!last) return;
      const turn = view.turn + .6 * (e.clientX - last[0]);
      const tilt = view.tilt + .4 * (e.clientY - last[1]);
      show({turn: (turn + 360) % 360, tilt: clamp(tilt, 0, 90)});
      last = [e.clientX, e.clientY];
    });
    for (const end of ['pointerup', 'pointercancel']) canvas.addEventListener(end, () => { last = null; });
  }

  function addView(parent, landscape, view, show) {
    const figure = html(parent, 'figure');
    const numbers = `loss ${number(middle(landscape), 4)} at the network, ` +
      `${number(border(landscape), 1)} on average at the border`;
    const canvas = html(figure, 'canvas', {role: 'img', 'aria-label': `${landscape.name}: ${numbers}`});
    const caption = html(figure, 'figcaption');
    html(caption, 'strong', {}, landscape.name);
    caption.append(`: ${numbers}`);
    turnByHand(canvas, view, show);
    return {canvas, landscape};
  }

  Parts.start('landscapes', (place, data) => {
    const view = {...START};
    const controls = html(place, 'div', {class: 'controls'});
    const turn = Parts.slider(controls, 'turn', {min: 0, max: 360, step: 5, value: view.turn, digits: 0},
      v => show({turn: v}));
    const tilt = Parts.slider(controls, 'tilt', {min: 0, max: 90, step: 5, value: view.tilt, digits: 0},
      v => show({tilt: v}));
    const label = html(controls, 'label');
    const log = html(label, 'input', {type: 'checkbox'});
    log.checked = view.log;
    label.append(' logarithmic');
    log.addEventListener('change', () => show({log: log.checked}));
    const row = html(place, 'div', {class: 'views'});
    const views = data.landscapes.map(landscape => addView(row, landscape, view, show));
    const [low, high] = LOSSES;
    html(place, 'p', {class: 'hint'},
      `Height and colour are the loss, from ${low} to ${high} in all three pictures. The red point is the ` +
      `trained network. Slice: ${data.landscapes[0].about}.`);
    new ResizeObserver(() => show({})).observe(row);

    function show(change) {
      Object.assign(view, change);
      turn.set(view.turn);
      tilt.set(view.tilt);
      for (const v of views) draw(v.canvas, v.landscape, view);
    }
  });
})();
