// Applies the colour theme that was chosen before. Not a module, so
// that it runs before anything is painted.
const chosen = localStorage.getItem("rlrag.theme");
if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
