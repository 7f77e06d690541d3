// The reader's earlier choice of colours in; the page's first paint in them out. Not a module, so
// that it runs before anything is painted.
const chosen = localStorage.getItem("rlrag.theme");
if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
