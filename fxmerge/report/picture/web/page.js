// The header's tools: searching, colours, keyboard shortcuts, light and dark; and the start of the page.
"use strict";
(() => {
  const search = d3.select("#search"), found = d3.select("#found"), names = fx.data.boxes.map((b) => b.modules.join(", "));
  let hits = [], at = 0;

  function list() {
    const sought = search.property("value").trim().toLowerCase();
    hits = sought ? d3.range(names.length).filter((i) => names[i].toLowerCase().includes(sought)) : [];
    at = 0;
    found.selectAll("li").data(hits.slice(0, 12)).join("li").attr("role", "option").text((i) => names[i])
      .attr("aria-selected", (_, i) => String(i === at)).on("click", (event, i) => { close(); fx.go(i); });
    search.attr("aria-expanded", String(hits.length > 0));
    fx.say(sought && !hits.length ? "no layer matches" : "");
  }

  function close() {
    found.selectAll("li").remove();
    search.attr("aria-expanded", "false");
    fx.say("");
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

  function colour(by) {
    fx.colour.choose(by);
    fx.scene.colour();
    legend();
  }

  function legend() { // what the colours and the bars of the boxes stand for
    const place = d3.select("#legend"), {by, most} = fx.colour;
    place.selectAll("*").remove();
    const add = (words, what) => { if (what) place.append("span").attr("class", what); place.append("span").text(words); };
    if (by === "group") {
      add("upper edge: groups consumed, lower edge: groups produced");
      if (fx.merged) add("channels kept, as in 64 → 32 (−50 %)", "sample");
      return;
    }
    place.append("span").text("0");
    place.append("span").attr("class", `ramp ${by}`);
    place.append("span").text(by === "error" ? fx.text.error(most) : `${fx.text.short(most)} parameters saved`);
    place.append("span").attr("class", "soft").text(by === "error" ? fx.measure.lossText : "parameters of a layer, before and after the merge");
  }

  function theme(name) {
    document.documentElement.dataset.theme = name;
    d3.select("#theme").attr("aria-pressed", String(name === "dark")).text(name === "dark" ? "Light" : "Dark");
    fx.panel.show(fx.chosen);
  }
  const other = () => theme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
  const asked = window.matchMedia("(prefers-color-scheme: dark)");

  const {camera} = fx, keys = {
    "/": () => search.node().focus(), Escape: () => fx.choose(null), e: fx.expand, c: fx.collapse, d: other,
    "0": camera.fit, "+": () => camera.zoomBy(1.25), "=": () => camera.zoomBy(1.25), "-": () => camera.zoomBy(0.8),
    ArrowUp: () => camera.panBy(0, 90), ArrowDown: () => camera.panBy(0, -90),
    ArrowLeft: () => camera.panBy(90, 0), ArrowRight: () => camera.panBy(-90, 0),
  };
  d3.select(window).on("keydown", (event) => {
    const within = event.target.closest?.("#panel, select");
    if (event.ctrlKey || event.metaKey || event.altKey || !keys[event.key] || (within && event.key.startsWith("Arrow"))) return;
    event.preventDefault();
    keys[event.key]();
  });
  d3.select("#collapse").on("click", fx.collapse);
  d3.select("#expand").on("click", fx.expand);
  d3.select("#fit").on("click", camera.fit);
  d3.select("#theme").on("click", other);
  d3.select("#png").on("click", fx.save.png);
  d3.select("#svg").on("click", fx.save.svg);
  d3.select("#pdf").on("click", fx.save.pdf);
  d3.select("#colour").on("change", function () { colour(this.value); }).attr("disabled", fx.merged ? null : "");
  asked.addEventListener("change", () => theme(asked.matches ? "dark" : "light"));

  fx.panel.summary();
  theme(asked.matches ? "dark" : "light");
  legend();
  window.addEventListener("hashchange", fx.address.read);
  fx.lay().then(() => { camera.start(); return fx.address.read(); }).then(() => { document.documentElement.dataset.ready = "yes"; });
})();
