// Equations are drawn by the MathJax beside this file: no other host is asked.
window.MathJax = {
  tex: { inlineMath: [["\\(", "\\)"]], displayMath: [["\\[", "\\]"]] },
  svg: { fontCache: "global" },
  options: { enableMenu: false, ignoreHtmlClass: ".*", processHtmlClass: "math" },
};
