// On a phone a figure of a cell keeps 72% of its own width, at least that of its box, and scrolls there:
// at the width of the box the letters of a wide figure would be too small to read.
(() => {
  const PHONE = 480, SHARE = .72;
  const fit = () => document.querySelectorAll('div.cell_output img').forEach(figure => {
    const box = figure.closest('div.cell_output').clientWidth;
    const wanted = Math.round(SHARE * figure.naturalWidth);
    const narrow = window.innerWidth <= PHONE && figure.naturalWidth > box;
    figure.style.width = narrow ? `${Math.max(box, wanted)}px` : '';
  });
  window.addEventListener('load', fit);
  window.addEventListener('resize', fit);
  document.addEventListener('toggle', fit, true); // a box inside details has no width before these open
})();
