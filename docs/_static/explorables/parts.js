// What all explorables are made of: elements, sliders, numbers, and the start.
const Parts = (() => {
  const number = (v, digits = 2) => v.toFixed(digits).replace('-', '\u2212');

  function svg(parent, tag, attributes = {}, text = '') {
    const e = document.createElementNS('http://www.w3.org/2000/svg', tag);
    for (const [name, value] of Object.entries(attributes)) e.setAttribute(name, value);
    e.textContent = text;
    parent.append(e);
    return e;
  }

  function html(parent, tag, attributes = {}, text = '') {
    const e = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) e.setAttribute(name, value);
    e.textContent = text;
    parent.append(e);
    return e;
  }

  // A labelled slider; `onInput` gets its value.
  function slider(parent, name, o, onInput) {
    const label = html(parent, 'label', {class: 'slider'});
    html(label, 'span', {}, name);
    const input = html(label, 'input', {type: 'range', min: o.min, max: o.max, step: o.step});
    const shown = html(label, 'span', {class: 'value', 'aria-hidden': 'true'}); // the slider says it itself
    const show = () => { shown.textContent = number(input.valueAsNumber, o.digits ?? 2); };
    input.value = o.value;
    input.addEventListener('input', () => { show(); onInput(input.valueAsNumber); });
    show();
    return {input, set: v => { input.value = v; show(); }};
  }

  // The sign of a method, in its colour
  function sign(parent, method) {
    const picture = svg(parent, 'svg', {class: 'sign', 'aria-hidden': 'true'});
    const place = {x: 8, y: 14, 'text-anchor': 'middle', class: 'mark', fill: method.color};
    svg(picture, 'text', place, method.shape);
  }

  // Fill the place of an explorable on this page, if there is one, and hide the still picture above it.
  function start(name, fill) {
    for (const place of document.querySelectorAll(`[data-explorable="${name}"]`)) {
      const data = document.getElementById(`data-${name}`);
      place.hidden = false;
      fill(place, data && JSON.parse(data.textContent));
      for (const still of document.querySelectorAll(`.tag_still_${name} .cell_output`)) still.hidden = true;
    }
  }

  return {html, svg, slider, sign, number, start};
})();
