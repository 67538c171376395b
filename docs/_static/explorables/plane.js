// A map of the loss with a point that is moved by hand: by mouse, by finger, or with the arrow keys.
// Used by one_step.js and race.js.
const Plane = (() => {
  const RANGE = {w1: [-1.6, 1.6], w2: [-.8, .8]};
  const LEVELS = [.1, .15, .2, .25, .3, .35, .4, .5, .7, 1, 1.5, 2.2, 3.2, 5, 8];
  const MARGIN = {left: 34, bottom: 32};
  const MINIMA = [['sharp', -1.0574538, '#b22222'], ['flat', .9304029, '#2e8b57']];
  const {html, svg, number} = Parts;
  const clamp = (v, [low, high]) => Math.min(high, Math.max(low, v));

  // The map itself. `start` is the first point. `onMove` gets the point whenever it moves, and `draw` gets
  // the map whenever it must be drawn anew.
  class LossMap {
    constructor(parent, name, start, onMove, draw) {
      this.point = [...start];
      this.name = name;
      this.onMove = onMove;
      this.draw = draw;
      this.box = html(parent, 'div', {class: 'plane'});
      this.canvas = html(this.box, 'canvas', {'aria-hidden': 'true'});
      this.svg = svg(this.box, 'svg', {});
      new ResizeObserver(() => this.resize()).observe(this.box);
      this.resize();
    }

    x(w1) { return MARGIN.left + (w1 - RANGE.w1[0]) / 3.2 * this.width; }
    y(w2) { return (RANGE.w2[1] - w2) / 1.6 * this.height; }

    resize() {
      const width = this.box.clientWidth - MARGIN.left;
      if (width <= 0 || width === this.width) return;
      this.width = width;
      this.height = Math.max(width / 2, 190);
      this.box.style.height = `${this.height + MARGIN.bottom}px`;
      this.svg.replaceChildren();
      this.paintLoss();
      this.drawAxes();
      const clip = svg(svg(this.svg, 'clipPath', {id: `clip-${this.name}`}), 'rect');
      const frame = {x: MARGIN.left, y: 0, width: this.width, height: this.height};
      for (const [k, v] of Object.entries(frame)) clip.setAttribute(k, v);
      this.layer = svg(this.svg, 'g', {'clip-path': `url(#clip-${this.name})`});
      this.addHandle();
      this.update();
    }

    // Areas between contour levels: the lower the loss, the more opaque. The page's ground shines through.
    paintLoss() {
      const [columns, rows] = [480, 240];
      Object.assign(this.canvas, {width: columns, height: rows});
      this.canvas.style.cssText =
        `left:${MARGIN.left}px; width:${this.width}px; height:${this.height}px`;
      const context = this.canvas.getContext('2d');
      const image = context.createImageData(columns, rows);
      for (let i = 0; i < columns * rows; i++) {
        const w1 = RANGE.w1[0] + 3.2 * (i % columns + .5) / columns;
        const w2 = RANGE.w2[1] - 1.6 * (Math.floor(i / columns) + .5) / rows;
        const level = LEVELS.filter(l => l < Steps.loss([w1, w2])).length;
        image.data.set([235, 150, 60, 15 * (LEVELS.length - level)], 4 * i);
      }
      context.putImageData(image, 0, 0);
    }

    drawAxes() {
      const bottom = this.height;
      for (const w of [-1.5, -1, -.5, 0, .5, 1, 1.5]) {
        svg(this.svg, 'text', {x: this.x(w), y: bottom + 14, 'text-anchor': 'middle'}, number(w, 1));
      }
      for (const w of [-.5, 0, .5]) {
        svg(this.svg, 'text', {x: MARGIN.left - 4, y: this.y(w) + 4, 'text-anchor': 'end'}, number(w, 1));
      }
      svg(this.svg, 'text', {x: this.x(0), y: bottom + 29, 'text-anchor': 'middle'}, 'weight w₁');
      svg(this.svg, 'text', {x: 2, y: 12}, 'w₂');
      for (const [name, w1, color] of MINIMA) {
        svg(this.svg, 'circle', {cx: this.x(w1), cy: this.y(0), r: 5, fill: color});
        const place = {x: this.x(w1), y: this.y(0) + 19, 'text-anchor': 'middle'};
        svg(this.svg, 'text', {...place, class: 'halo'}, name);
      }
    }

    addHandle() {
      this.handle = svg(this.svg, 'g', {
        class: 'handle', tabindex: 0, role: 'slider', 'aria-roledescription': 'point on a map',
        'aria-label': 'the weights; the arrow keys move them', 'aria-valuemin': RANGE.w1[0],
        'aria-valuemax': RANGE.w1[1]});
      svg(this.handle, 'circle', {r: 22, class: 'touch'});
      svg(this.handle, 'circle', {r: 8, class: 'ring'});
      const move = e => {
        const box = this.svg.getBoundingClientRect();
        const w1 = RANGE.w1[0] + 3.2 * (e.clientX - box.left - MARGIN.left) / this.width;
        const w2 = RANGE.w2[1] - 1.6 * (e.clientY - box.top) / this.height;
        this.moveTo([w1, w2]);
      };
      this.handle.addEventListener('pointerdown', e => {
        this.handle.setPointerCapture(e.pointerId);
        this.handle.addEventListener('pointermove', move);
      });
      for (const end of ['pointerup', 'pointercancel']) {
        this.handle.addEventListener(end, () => this.handle.removeEventListener('pointermove', move));
      }
      this.handle.addEventListener('keydown', e => this.onKey(e));
    }

    onKey(e) {
      const by = e.shiftKey ? .1 : .02;
      const moves = {ArrowLeft: [-by, 0], ArrowRight: [by, 0], ArrowUp: [0, by], ArrowDown: [0, -by]};
      const move = moves[e.key];
      if (!move) return;
      e.preventDefault(); // the page would scroll
      this.moveTo([this.point[0] + move[0], this.point[1] + move[1]]);
    }

    // Move the point to the nearest place on the map.
    moveTo(w) {
      this.point = [clamp(w[0], RANGE.w1), clamp(w[1], RANGE.w2)];
      this.onMove(this.point);
      this.update();
    }

    update() {
      if (!this.layer) return;
      const [w1, w2] = this.point;
      this.handle.setAttribute('transform', `translate(${this.x(w1)} ${this.y(w2)})`);
      this.handle.setAttribute('aria-valuenow', w1.toFixed(2));
      const where = `w1 ${number(w1)}, w2 ${number(w2)}, loss ${number(Steps.loss(this.point), 3)}`;
      this.handle.setAttribute('aria-valuetext', where);
      this.layer.replaceChildren();
      this.draw(this);
    }

    // Draw a line through points, with a ground of the page's colour below it.
    line(points, color, kind = '') {
      const path = points.map(w => `${this.x(w[0])},${this.y(w[1])}`).join(' ');
      svg(this.layer, 'polyline', {points: path, class: `ground ${kind}`});
      svg(this.layer, 'polyline', {points: path, class: kind, stroke: color});
    }

    mark(w, method) {
      const place = {x: this.x(w[0]), y: this.y(w[1]) + 5, 'text-anchor': 'middle', fill: method.color};
      svg(this.layer, 'text', {...place, class: 'halo mark'}, method.shape);
    }
  }

  return {LossMap};
})();
