// The side panel and the header: lists of everything, or the selected group or layer.
"use strict";
fx.panel = (() => {
  const panel = d3.select("#panel"), {text} = fx;

  function show(chosen) {
    panel.node().replaceChildren();
    panel.node().scrollTop = 0;
    if (!chosen) return fx.lists.show(panel);
    panel.append("button").text("← all groups").attr("id", "back").on("click", () => fx.choose(null, true));
    const isAlone = chosen.box === undefined, hasGroup = chosen.group !== undefined && chosen.group !== null;
    if (!isAlone) fx.details.layer(panel, chosen.box);
    if (!isAlone && hasGroup) panel.append("hr");
    if (hasGroup) fx.details.group(panel, chosen.group, isAlone);
  }

  function summary() {
    const {sentence, parameters, flops, error, reason} = fx.data.summary, list = d3.select("#summary");
    d3.select("#title").text(fx.data.title);
    d3.select("#sentence").text(sentence ?? "");
    const rows = [["parameters", text.costs(parameters)], ["FLOPs", text.costs(flops)]];
    if (fx.merged) rows.push(["output error", error === null ? "not measurable" : text.error(error), reason]);
    for (const [name, value, why] of rows) {
      const row = list.append("div");
      row.append("dt").text(name);
      row.append("dd").attr("title", why || null).text(value);
    }
  }

  return {show, summary};
})();
