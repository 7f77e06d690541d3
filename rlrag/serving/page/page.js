// The page: tabs, colour theme, keyboard shortcuts and settings in the address.

import { apiKey, setApiKey } from "./api.js";
import { startAsking, stop } from "./ask.js";
import { byId } from "./elements.js";
import { startTraffic } from "./traffic.js";

const tabs = [byId("tab-ask"), byId("tab-traffic")];
const STEPS = { ArrowRight: 1, ArrowLeft: -1 };

const panelOf = (tab) => byId(tab.getAttribute("aria-controls"));

function select(chosen) {
  for (const tab of tabs) {
    const selected = tab === chosen;
    tab.setAttribute("aria-selected", String(selected));
    tab.tabIndex = selected ? 0 : -1;
    panelOf(tab).hidden = !selected;
  }
  document.title = `${chosen.textContent} · rlrag`;
  history.replaceState(null, "", chosen === tabs[0] ? location.pathname : "#traffic");
  document.dispatchEvent(new CustomEvent("tab", { detail: chosen.id }));
}

function onTabKey(event) {
  const at = tabs.indexOf(event.currentTarget);
  const ends = { Home: 0, End: tabs.length - 1 };
  const step = STEPS[event.key];
  const to = step ? (at + step + tabs.length) % tabs.length : ends[event.key];
  if (to === undefined) return;
  event.preventDefault();
  select(tabs[to]);
  tabs[to].focus();
}

const isTyping = (element) => element.matches("textarea, select, input:not([type=checkbox])");

function onKey(event) {
  const settingsOpen = byId("settings").matches(":popover-open");
  if (event.key === "Escape" && !settingsOpen && stop()) event.preventDefault();
  const plain = !event.ctrlKey && !event.metaKey && !event.altKey;
  if (event.key === "/" && plain && !isTyping(event.target)) {
    event.preventDefault();
    select(tabs[0]);
    byId("question").focus();
  }
}

const root = document.documentElement;
const systemDark = matchMedia("(prefers-color-scheme: dark)");

const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : systemDark.matches);

function showTheme() {
  byId("theme-label").textContent = isDark() ? "Light colours" : "Dark colours";
}

function switchTheme() {
  root.dataset.theme = isDark() ? "light" : "dark";
  localStorage.setItem("rlrag.theme", root.dataset.theme);
  showTheme();
}

for (const tab of tabs) {
  tab.addEventListener("click", () => select(tab));
  tab.addEventListener("keydown", onTabKey);
}
document.addEventListener("keydown", onKey);
byId("theme").addEventListener("click", switchTheme);
systemDark.addEventListener("change", showTheme);
byId("api-key").value = apiKey();
byId("api-key").addEventListener("input", ({ target }) => setApiKey(target.value.trim()));
showTheme();
startAsking();
startTraffic();
select(location.hash === "#traffic" ? tabs[1] : tabs[0]);
if (!location.hash) byId("question").focus();
