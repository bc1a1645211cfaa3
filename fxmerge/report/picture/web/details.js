// The panel of the selected group or layer: its figures, members, weights and attributes.
"use strict";
fx.details = (() => {
  const {groups, boxes, refusals, tables} = fx.data, {measure, text, widgets} = fx;

  function chips(place, title, names) {
    if (!names.length) return;
    const row = place.append("tr");
    row.append("th").attr("scope", "row").text(names.length > 1 ? `${title} (${names.length})` : title);
    const list = row.append("td").append("div").attr("class", "chips");
    const add = (some) => some.forEach((name) => widgets.dotted(list.append("button"), name).on("click", () => fx.find(name)));
    add(names.slice(0, 12));
    if (names.length > 12) list.append("button").text(`and ${names.length - 12} more`)
      .on("click", function () { this.remove(); add(names.slice(12)); });
  }

  function comparison(panel, rows) { // two bars for each figure: in the original and in the merged model
    const body = panel.append("table").attr("class", "compared").append("tbody");
    for (const [name, values, form] of rows) {
      if (!(values[0] > 0)) continue;
      const row = body.append("tr");
      row.append("th").attr("scope", "row").text(name);
      widgets.twoBars(row.append("td"), values, form, Math.max(...values.filter(Number.isFinite)));
    }
  }

  function group(panel, at, isAlone) {
    const g = groups[at], head = panel.append(isAlone ? "h2" : "h3").attr("class", "head");
    widgets.swatch(head, at);
    widgets.dotted(head.append("span"), g.name);
    if (g.refused) widgets.refusal(panel, {channels: g.channels, reason: g.refused}, "The whole group");
    const closed = new Set(fx.members(at).map((b) => fx.network.collapsed(boxes[b].frame)).filter((f) => f !== undefined));
    if (closed.size) panel.append("button").attr("id", "open").text(`Open ${text.counted(closed.size, "closed module")} with members`)
      .on("click", () => fx.goGroup(at, true, Infinity));
    const solved = g.refit.filter((r) => r.before !== r.after), lost = g.channels - g.kept;
    comparison(panel, [["channels", fx.merged ? [g.channels, g.kept] : [g.channels], text.whole],
      ["parameters of its layers", g.parameters, text.short], ["FLOPs of its layers", g.flops, text.short]]);
    const mean = (key) => text.error(d3.mean(solved, (r) => r[key]));
    widgets.table(panel, [
      ...(solved.length ? [["mean error of its layers, before refit", mean("before")], ["after refit", mean("after")]] : []),
      ...(fx.merged && lost && !measure.isMeasured ? [["estimated loss", text.error(measure.groupLoss[at])]] : []),
      ...(fx.merged && lost && g.components ? [["kept as principal components; cosine of what its consumers read and what is left of it",
        Number.isFinite(g.similarity) ? g.similarity.toFixed(2) : "–"]] : []),
      ...(fx.merged && lost && !g.components ? [["similarity of dropped to kept channels", Number.isFinite(g.similarity) ? g.similarity.toFixed(2) : "–"],
        ["dropped channels with a partner", text.whole(g.dropped - g.unpartnered)], ["dropped channels without a partner", text.whole(g.unpartnered)]] : []),
    ]);
    if (g.scaleBlocks.length) panel.append("p").attr("class", "soft").text(`Channels are merged without rescaling, because scaling does not pass through ${g.scaleBlocks.slice(0, 3).join(", ")}${g.scaleBlocks.length > 3 ? " and others" : ""}.`);
    panel.append("h3").text("Its layers");
    const layers = panel.append("table").attr("class", "members").append("tbody");
    for (const [title, names] of [["Producers", g.producers], ["Per-channel parameters", g.per_channel_params], ["Consumers", g.consumers],
      ["Mixers", g.mixers], ["Joined by", g.ties]]) chips(layers, title, names);
    fx.channels.partners(panel, g);
    fx.channels.heat(panel, g);
    if (!g.refit.length) return;
    panel.append("h3").text(`Error before and after refit (${g.refit.length})`);
    widgets.table(panel, g.refit.map((r) => r.before === r.after ? [r.name, r.note || text.error(r.before), ""] : [r.name, text.error(r.before), text.error(r.after)]));
  }

  function unit(panel, name, {op, output, dtype, weights, attributes}) { // one layer of a box: its weights and attributes
    const shape = (sizes) => sizes === null || sizes === undefined ? "–" : sizes.join(" × ") || "scalar";
    const head = panel.append("h3");
    widgets.dotted(head, name);
    head.append("span").attr("class", "soft").text(` ${op}`);
    if (output) panel.append("p").attr("class", "soft").text(`returned ${shape(output)} ${dtype} on the example inputs`);
    const heads = (title) => fx.merged ? [title, "original", "merged"] : [title, ""];
    const cells = (form) => ([key, before, after]) => [key, form(before), ...(fx.merged ? [form(after ?? before)] : [])];
    if (weights.length) widgets.table(panel.append("div").attr("class", "weights"), weights.map(cells(shape)), heads("tensor"));
    if (attributes.length) widgets.table(panel.append("div").attr("class", "attributes"), attributes.map(cells(String)), heads("attribute"));
    panel.selectAll(".weights tbody tr, .attributes tbody tr").classed("changed", function () {
      const [one, other] = d3.select(this).selectAll("td").nodes();
      return other !== undefined && one.textContent !== other.textContent;
    });
  }

  function layer(panel, at) {
    const box = boxes[at];
    widgets.dotted(panel.append("h2"), box.modules.slice(0, 12).join(", "));
    panel.append("p").attr("class", "soft").text(box.op);
    comparison(panel, [["channels of its output", fx.merged ? [box.before, box.after] : [box.before], text.whole], ["parameters", box.parameters, text.short], ["FLOPs", box.flops, text.short]]);
    if (Number.isFinite(measure.boxLoss[at])) widgets.table(panel, [[measure.isMeasured ? "error after refit" : measure.lossName, text.error(measure.boxLoss[at])]]);
    box.refused.forEach((r) => widgets.refusal(panel, refusals[r], refusals[r].name));
    const words = {producer: "producer", per_channel_param: "per-channel parameter", consumer: "consumer", mixer: "mixer", tie: "tie"};
    const list = panel.append("ul");
    for (const [g, roles] of d3.group(box.roles, (r) => r[0])) {
      list.append("li").attr("class", "soft does").text(roles[0][1] === "pass" ? "passes on" : `${roles.map((r) => words[r[1]]).join(", ")} of`);
      widgets.groupRow(list, g);
    }
    box.tables.forEach((number, i) => unit(panel, box.modules[i], tables[number]));
    const others = box.modules.length - box.tables.length;
    if (others) panel.append("p").attr("class", "soft").text(`and ${others} more`);
  }

  return {group, layer};
})();
