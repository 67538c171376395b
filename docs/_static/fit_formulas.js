// A displayed formula that is wider than its column gets smaller letters, down to 60%; below that it scrolls.
(() => {
  const SMALLEST = .6;
  const fit = () => document.querySelectorAll('mjx-container[display="true"]').forEach(formula => {
    let size = 1;
    formula.style.fontSize = '';
    // not all gaps in a formula shrink with its letters, so one step may be too short
    while (formula.scrollWidth > formula.clientWidth && size > SMALLEST) {
      size = Math.max(SMALLEST, .98 * size * formula.clientWidth / formula.scrollWidth);
      formula.style.fontSize = `${100 * size}%`;
    }
  });
  window.addEventListener('load', () => {
    if (window.MathJax && MathJax.startup && MathJax.startup.promise) MathJax.startup.promise.then(fit);
  });
  window.addEventListener('resize', fit);
})();
