// The page's behaviour: selecting, expanding and collapsing, searching, keyboard shortcuts, light and dark.
"use strict";
fx.chosen = null;

fx.chosenGroup = (groups) => {
  if (groups.includes(fx.chosen?.group)) return fx.chosen.group;
  return groups.find((g) => fx.data.groups[g].shared) ?? groups[0];
};

fx.groupOf = (box) => {
  const roles = fx.data.boxes[box].roles;
  const first = (...kinds) => kinds.map((kind) => roles.find(([, role]) => role === kind)).find(Boolean);
  return first("producer", "tie", "per_channel_param", "mixer", "consumer", "pass")?.[0];
};

fx.choose = (what, fromPanel) => {
  fx.chosen = what && {...what, group: what.group ?? (what.box !== undefined ? fx.groupOf(what.box) : undefined)};
  fx.panel.show(fx.chosen);
  fx.scene.mark();
  if (fromPanel) document.getElementById("panel").focus();
};

fx.lay = async () => {
  const status = d3.select("#status").text("computing the layout …");
  await new Promise((done) => setTimeout(done, 15)); // lets the browser show the status first
  fx.scene.draw(await fx.network.layout(fx.network.view()));
  status.text("");
};

fx.toggle = async (frame) => {
  const id = `f${fx.frames.get(frame).at}`, old = fx.scene.place(id), opening = !fx.open.has(frame);
  if (opening && fx.network.shown() + fx.network.size(frame) - 1 > fx.LIMIT) {
    d3.select("#status").text("too many layers are visible; collapse some modules first");
    return;
  }
  if (opening) fx.open.add(frame); else fx.open.delete(frame);
  await fx.lay();
  fx.scene.keep(old, id);
  fx.scene.focus(id);
};

fx.collapse = async () => { fx.open.clear(); await fx.lay(); fx.scene.start(); };
fx.expand = async () => { if (fx.network.expand()) { await fx.lay(); fx.scene.start(); } };

fx.go = async (box) => {
  const shut = fx.network.ancestors(fx.data.boxes[box].frame).filter((f) => !fx.open.has(f));
  if (shut.length) { shut.forEach((f) => fx.open.add(f)); await fx.lay(); }
  fx.scene.show(box);
  fx.choose({box});
};

fx.find = (name) => {
  const at = fx.data.boxes.findIndex((b) => b.modules.includes(name) || b.label === name);
  if (at >= 0) return fx.go(at);
};

(() => {
  const search = d3.select("#search"), found = d3.select("#found"), names = fx.data.boxes.map((b) => b.modules.join(", "));
  let hits = [], at = 0;

  function list() {
    const sought = search.property("value").trim().toLowerCase();
    hits = sought ? d3.range(names.length).filter((i) => names[i].toLowerCase().includes(sought)) : [];
    at = 0;
    found.selectAll("li").data(hits.slice(0, 12)).join("li").attr("role", "option").text((i) => names[i])
      .attr("aria-selected", (_, i) => String(i === at)).on("click", (event, i) => { close(); fx.go(i); });
    d3.select("#status").text(sought && !hits.length ? "no layer matches" : "");
  }

  function close() {
    found.selectAll("li").remove();
    d3.select("#status").text("");
  }

  search.on("input", list).on("keydown", (event) => {
    if (event.key === "Escape") { search.property("value", ""); close(); search.node().blur(); }
    if (event.key === "Enter" && hits.length) fx.go(hits[at]);
    if ((event.key === "ArrowDown" || event.key === "ArrowUp") && hits.length) {
      event.preventDefault();
      const most = Math.min(hits.length, 12);
      at = (at + (event.key === "ArrowDown" ? 1 : most - 1)) % most;
      found.selectAll("li").attr("aria-selected", (_, i) => String(i === at));
    }
    event.stopPropagation();
  }).on("blur", () => setTimeout(close, 200));

  function theme(name) {
    document.documentElement.dataset.theme = name;
    d3.select("#theme").attr("aria-pressed", String(name === "dark")).text(name === "dark" ? "Light" : "Dark");
    fx.panel.show(fx.chosen);
  }
  const other = () => theme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
  const asked = window.matchMedia("(prefers-color-scheme: dark)");

  const keys = {
    "/": () => search.node().focus(), Escape: () => fx.choose(null), e: fx.expand, c: fx.collapse, d: other,
    "0": fx.scene.fit, "+": () => fx.scene.zoomBy(1.25), "=": () => fx.scene.zoomBy(1.25), "-": () => fx.scene.zoomBy(0.8),
    ArrowUp: () => fx.scene.panBy(0, 90), ArrowDown: () => fx.scene.panBy(0, -90),
    ArrowLeft: () => fx.scene.panBy(90, 0), ArrowRight: () => fx.scene.panBy(-90, 0),
  };
  d3.select(window).on("keydown", (event) => {
    const within = event.target.closest?.("#panel");
    if (event.ctrlKey || event.metaKey || event.altKey || !keys[event.key] || (within && event.key.startsWith("Arrow"))) return;
    event.preventDefault();
    keys[event.key]();
  });
  d3.select("#collapse").on("click", fx.collapse);
  d3.select("#expand").on("click", fx.expand);
  d3.select("#fit").on("click", fx.scene.fit);
  d3.select("#theme").on("click", other);
  asked.addEventListener("change", () => theme(asked.matches ? "dark" : "light"));

  fx.panel.summary();
  theme(asked.matches ? "dark" : "light");
  function linked() { // the layer of a link such as page.html#layer1.0.conv1
    const name = location.hash.slice(1);
    try { return fx.find(decodeURIComponent(name)); } catch { return fx.find(name); } // a "%" that is not part of a code
  }
  window.addEventListener("hashchange", linked);
  fx.lay().then(() => { fx.scene.start(); return linked(); }).then(() => { document.documentElement.dataset.ready = "yes"; });
})();
