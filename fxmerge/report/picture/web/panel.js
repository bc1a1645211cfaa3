// The side panel: an overview of all groups, or the selected group or layer with its figures, partners and heat map.
"use strict";
fx.panel = (() => {
  const panel = d3.select("#panel"), {groups, boxes, refusals} = fx.data;
  const whole = d3.format(",d"), short = (n) => d3.format(".3s")(n).replace("G", " G").replace("M", " M").replace("k", " k");
  const merged = fx.data.summary.parameters.length > 1;
  const width = (g) => g.kept !== g.channels ? `${g.channels} → ${g.kept}` : `${g.channels}`;

  function swatch(place, at) {
    place.append("span").attr("class", `swatch${groups[at].refused ? " refused" : ""}`).style("background-color", groups[at].colour);
  }

  function dotted(place, name) { // a long path may break after its dots
    name.split(".").forEach((part, i, all) => {
      place.append("span").text(part + (i < all.length - 1 ? "." : ""));
      if (i < all.length - 1) place.append("wbr");
    });
    return place;
  }

  function groupRow(list, at) {
    const row = list.append("li").append("button").attr("class", "row").attr("data-group", at)
      .on("click", () => fx.choose({group: at}, true)).on("mouseenter", () => fx.scene.mark(at)).on("mouseleave", () => fx.scene.mark());
    swatch(row, at);
    dotted(row.append("span").attr("class", "what"), groups[at].name);
    row.append("span").attr("class", "size").text(width(groups[at]));
  }

  function section(title, values) {
    if (values.length) panel.append("h3").text(`${title} (${values.length})`);
    return values.length > 0;
  }

  function chips(place, title, names) {
    if (!names.length) return;
    const row = place.append("tr");
    row.append("th").attr("scope", "row").text(names.length > 1 ? `${title} (${names.length})` : title);
    const list = row.append("td").append("div").attr("class", "chips");
    const add = (some) => some.forEach((name) => dotted(list.append("button"), name).on("click", () => fx.find(name)));
    add(names.slice(0, 12));
    if (names.length > 12) list.append("button").text(`and ${names.length - 12} more`)
      .on("click", function () { this.remove(); add(names.slice(12)); });
  }

  function table(rows) {
    const body = panel.append("table").append("tbody");
    for (const [name, ...values] of rows) {
      const row = body.append("tr");
      row.append("th").attr("scope", "row").text(name);
      values.forEach((value) => row.append("td").attr("class", "number").text(value));
    }
  }

  function pair(values, form) {
    const shown = (value) => Number.isFinite(value) ? form(value) : "–"; // not every error and cost can be measured
    return values.length < 2 ? shown(values[0]) : `${shown(values[0])} → ${shown(values[1])}`;
  }

  function refusal(at) {
    const r = refusals[at], box = panel.append("div").attr("class", "refusal");
    box.append("p").append("strong").text(`${r.name}: ${r.channels} channels not merged`);
    box.append("p").text(r.reason);
    if (r.where) box.append("p").attr("class", "soft").text(r.where);
  }

  function overview() {
    panel.append("h2").text(`${groups.length} merge groups`);
    panel.append("p").attr("class", "soft").text("The layers of one colour keep and drop the same channels. The upper edge of a box shows the groups that it consumes, the lower edge those that it produces. Select a group, a layer or an arrow.");
    for (const [title, shared] of [["Shared by several layers", true], ["With one producer, on one path", false]]) {
      const inside = d3.range(groups.length).filter((at) => groups[at].shared === shared);
      if (section(title, inside)) { const list = panel.append("ul"); inside.forEach((at) => groupRow(list, at)); }
    }
    if (section("Not merged", refusals)) d3.range(Math.min(refusals.length, 200)).forEach(refusal);
  }

  function heat(g) {
    const {channels, kept, cosines} = g.likeness, n = channels.length, shown = merged && !g.components;
    if (n < 2) return;
    panel.append("h3").text(n < g.channels ? `Similarity of ${n} of ${g.channels} channels, clustered` : "Similarity of the channels, clustered");
    const canvas = panel.append("canvas").attr("width", n).attr("height", n).attr("role", "img")
      .attr("aria-label", `Cosines of ${n} channels`).node();
    const bytes = Uint8Array.from(atob(cosines), (c) => c.charCodeAt(0)), pen = canvas.getContext("2d"), image = pen.createImageData(n, n);
    const style = getComputedStyle(document.documentElement), [back, ink] = ["--back", "--ink"].map((name) => style.getPropertyValue(name).trim());
    const colour = d3.scaleLinear([-1, 0, 1], [ink, back, g.colour]).interpolate(d3.interpolateRgb).clamp(true);
    const put = (i, j, value) => { const c = d3.rgb(colour(value)); image.data.set([c.r, c.g, c.b, 255], 4 * (i * n + j)); };
    const value = (i, j) => i === j ? 1 : bytes[Math.min(i, j) * (2 * n - Math.min(i, j) - 1) / 2 + Math.abs(i - j) - 1] / 127 - 1;
    for (let i = 0; i < n; i++) for (let j = 0; j < n; j++) put(i, j, value(i, j));
    pen.putImageData(image, 0, 0);
    const legend = panel.append("div").attr("class", "legend");
    ["cosine -1 (grey)", "0", "1 (the group's colour)"].forEach((t) => legend.append("span").text(t));
    const hint = panel.append("p").attr("class", "soft").text(`Hover over a cell to see its channels. ${shown ? `${[...kept].filter((c) => c === "1").length} of them are kept.` : ""}`);
    d3.select(canvas).on("mousemove", (event) => {
      const [x, y] = d3.pointer(event), side = canvas.clientWidth / n;
      const i = Math.min(n - 1, Math.floor(y / side)), j = Math.min(n - 1, Math.floor(x / side));
      const fate = (at) => shown ? (kept[at] === "1" ? " (kept)" : " (dropped)") : "";
      hint.text(`channels ${channels[i]}${fate(i)} and ${channels[j]}${fate(j)}: cosine ${value(i, j).toFixed(2)}`);
    });
  }

  function partners(g) {
    const drawn = g.partners.filter((p) => p[1] >= 0);
    if (!drawn.length) return;
    const all = g.dropped - g.unpartnered;
    panel.append("h3").text(drawn.length < all ? `Dropped channels and their partners (${drawn.length} of ${all})` : "Dropped channels and their partners");
    const into = [...new Set(drawn.map((p) => p[1]))], high = drawn.length * 16 + 26;
    const svg = panel.append("svg").attr("class", "partners").attr("width", "100%").attr("viewBox", `0 0 350 ${high}`)
      .attr("role", "img").attr("aria-label", "Dropped channels and the kept channels that they are merged into");
    const left = d3.scalePoint(d3.range(drawn.length), [30, high - 10]).align(0);
    const right = new Map(into.map((k) => [k, d3.mean(drawn.map((p, i) => p[1] === k ? left(i) : null).filter((y) => y !== null))]));
    svg.append("text").attr("class", "head").attr("x", 60).attr("y", 12).attr("text-anchor", "end").text("dropped");
    svg.append("text").attr("class", "head").attr("x", 205).attr("y", 12).text("kept");
    svg.append("text").attr("class", "head").attr("x", 346).attr("y", 12).attr("text-anchor", "end").text("scale, cosine");
    drawn.forEach(([channel, kept, scale, cosine], i) => {
      svg.append("path").attr("d", d3.linkHorizontal()({source: [66, left(i) - 4], target: [198, right.get(kept) - 4]}))
        .style("fill", "none").style("stroke", g.colour).style("stroke-width", 0.8 + 2.4 * Math.max(cosine ?? 0, 0)).style("opacity", 0.35 + 0.65 * Math.max(cosine ?? 0, 0));
      svg.append("text").attr("x", 60).attr("y", left(i)).attr("text-anchor", "end").text(channel);
      svg.append("text").attr("x", 346).attr("y", left(i)).attr("text-anchor", "end").text(`× ${(scale ?? 0).toFixed(2)}, ${(cosine ?? 0).toFixed(2)}`);
    });
    right.forEach((y, k) => svg.append("text").attr("x", 205).attr("y", y).text(k));
  }

  function digits(value) {
    return Number.isFinite(value) ? value.toPrecision(3) : "–";
  }

  function group(at) {
    const g = groups[at], head = panel.append("h2");
    swatch(head.style("display", "flex").style("gap", "8px").style("align-items", "center"), at);
    dotted(head.append("span"), g.name);
    if (g.refused) panel.append("div").attr("class", "refusal").append("p").text(`Not merged: ${g.refused}`);
    const lost = g.channels - g.kept, solved = g.refit.filter((r) => r.before !== r.after);
    table([
      ["channels", width(g)],
      ...(merged && lost && g.components ? [["kept as principal components; cosine of what its consumers read and what is left of it", Number.isFinite(g.similarity) ? g.similarity.toFixed(2) : "–"]] : []),
      ...(merged && lost && !g.components ? [["similarity of dropped to kept channels", Number.isFinite(g.similarity) ? g.similarity.toFixed(2) : "–"],
        ["dropped channels with a partner", whole(g.dropped - g.unpartnered)], ["dropped channels without a partner", whole(g.unpartnered)]] : []),
      ...(solved.length ? [["mean error of its layers before and after refit", pair(["before", "after"].map((k) => d3.mean(solved, (r) => r[k])), d3.format(".2r"))]] : []),
      ["parameters of its layers", pair(g.parameters, short)], ["FLOPs of its layers", pair(g.flops, short)],
    ]);
    if (g.scaleBlocks.length) panel.append("p").attr("class", "soft").text(`Channels are merged without rescaling, because scaling does not pass through ${g.scaleBlocks.slice(0, 3).join(", ")}${g.scaleBlocks.length > 3 ? " and others" : ""}.`);
    panel.append("h3").text("Its layers");
    const layers = panel.append("table").attr("class", "members").append("tbody");
    for (const [title, names] of [["Producers", g.producers], ["Per-channel parameters", g.per_channel_params], ["Consumers", g.consumers],
      ["Mixers", g.mixers], ["Joined by", g.ties]]) chips(layers, title, names);
    partners(g);
    heat(g);
    if (section("Error before and after refit", g.refit)) table(g.refit.map((r) => r.before === r.after
      ? [r.name, r.note || digits(r.before), ""] : [r.name, digits(r.before), digits(r.after)]));
  }

  function layer(at) {
    const box = boxes[at];
    dotted(panel.append("h2"), box.modules.join(", "));
    panel.append("p").attr("class", "soft").text(`${box.op}${box.before ? `, ${box.after !== box.before ? `${box.before} → ${box.after}` : box.before} channels` : ""}`);
    box.refused.forEach(refusal);
    const words = {producer: "producer", per_channel_param: "per-channel parameter", consumer: "consumer", mixer: "mixer", tie: "tie"};
    const list = panel.append("ul");
    for (const [g, roles] of d3.group(box.roles, (r) => r[0])) {
      list.append("li").attr("class", "soft does").text(roles[0][1] === "pass" ? "passes on" : `${roles.map((r) => words[r[1]]).join(", ")} of`);
      groupRow(list, g);
    }
  }

  function show(chosen) {
    panel.selectAll("*").remove();
    panel.node().scrollTop = 0;
    if (!chosen) return overview();
    panel.append("button").text("← all groups").attr("id", "back").style("margin-bottom", "10px").on("click", () => fx.choose(null, true));
    if (chosen.box !== undefined) layer(chosen.box);
    if (chosen.group !== undefined && chosen.group !== null) {
      if (chosen.box !== undefined) panel.append("hr");
      group(chosen.group);
    }
  }

  function summary() {
    const {parameters, flops, error, reason, seconds} = fx.data.summary, list = d3.select("#summary");
    d3.select("#title").text(fx.data.title);
    const left = (v) => v.length > 1 && v[0] ? ` ${d3.format(".1%")(v[1] / v[0])} left` : "";
    const rows = [["parameters", pair(parameters, short), left(parameters)], ["FLOPs", pair(flops, short), left(flops)]];
    if (merged) rows.push(["output error", error === null ? "not measurable" : d3.format(".3")(error), ""]);
    if (seconds) rows.push(["merge time", `${d3.format(".2r")(seconds)} s`, ""]);
    rows.push(["groups", `${merged ? groups.filter((g) => g.kept < g.channels).length : groups.length}`, merged ? ` of ${groups.length} merged` : ""],
      ["not merged", `${refusals.length}`, ""]);
    for (const [name, value, more, why] of rows) {
      const row = list.append("div");
      row.append("dt").text(name);
      row.append("dd").attr("title", why || null).text(value).append("span").text(more);
    }
  }

  return {show, summary};
})();
