// A displayed formula that is wider than its column gets smaller letters, down to 60%; below that it scrolls.
(() => {
  const SMALLEST = .6;
  const fit = () => document.querySelectorAll('mjx-container[display="true"]').forEach(formula => {
    formula.style.fontSize = '';
    const share = formula.clientWidth / formula.scrollWidth;
    if (share < 1) formula.style.fontSize = `${100 * Math.max(SMALLEST, .98 * share)}%`;
  });
  window.addEventListener('load', () => {
    if (window.MathJax && MathJax.startup && MathJax.startup.promise) MathJax.startup.promise.then(fit);
  });
  window.addEventListener('resize', fit);
})();
