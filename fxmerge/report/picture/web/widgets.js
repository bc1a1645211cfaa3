// Parts of the side panel: swatches, names that may break, bars, tables, rows of groups and of layers.
"use strict";
fx.widgets = (() => {
  const {groups, boxes} = fx.data, {text, measure} = fx;

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

  function bar(place, share, kind) { // the numbers beside it say the same
    const track = place.append("span").attr("class", "bar").attr("aria-hidden", "true");
    track.append("span").attr("class", kind || null).style("width", `${100 * Math.min(Math.max(share || 0, 0), 1)}%`);
  }

  function twoBars(place, values, form, most) { // the original above the merged model, as long as their values
    const rows = place.append("span").attr("class", "two");
    values.forEach((value, i) => {
      bar(rows, value / most, i ? "after" : "before");
      const words = form(value) + (i && value !== values[0] && values[0] > 0 && Number.isFinite(value) ? ` (${text.difference(values[0], value)})` : "");
      rows.append("span").attr("class", "number").text(words).attr("aria-label", `${i ? "merged" : "original"} ${words}`);
    });
  }

  function table(place, rows, heads) {
    const whole = place.append("table");
    if (heads) whole.append("thead").append("tr").selectAll("th").data(heads).join("th").attr("scope", "col").text((h) => h);
    const body = whole.append("tbody");
    for (const [name, ...values] of rows) {
      const row = body.append("tr");
      row.append("th").attr("scope", "row").text(name);
      values.forEach((value) => row.append("td").attr("class", value.length > 24 ? null : "number").text(value)); // words may break
    }
  }

  function width(g) {
    return `${text.change(g.channels, g.kept)}${g.kept === g.channels ? " channels" : ""}`;
  }

  function groupRow(list, at, fact) { // a button that shows a group in the network
    const g = groups[at], row = list.append("li").append("button").attr("class", "row").attr("data-group", at)
      .attr("aria-pressed", String(fx.chosen?.group === at))
      .on("click", () => fx.goGroup(at, true)).on("mouseenter", () => fx.scene.mark(at)).on("mouseleave", () => fx.scene.mark());
    swatch(row, at);
    const lines = row.append("span").attr("class", "what");
    dotted(lines.append("span").attr("class", "title"), g.name);
    const second = lines.append("span").attr("class", "second");
    if (fx.merged) bar(second, g.kept / g.channels);
    second.append("span").attr("class", "size").text(width(g));
    if (fact) second.append("span").attr("class", "fact").text(fact);
  }

  function boxRow(list, at, which, most) { // a button that shows a layer in the network, with two bars
    const box = boxes[at], values = which === "channels" ? (fx.merged ? [box.before, box.after] : [box.before]) : box[which];
    const row = list.append("li").append("button").attr("class", "row tall").attr("data-box", at).on("click", () => fx.go(at, true));
    const head = row.append("span").attr("class", "title");
    dotted(head, box.modules.slice(0, 3).join(", "));
    head.append("span").attr("class", "soft").text(` ${box.op !== box.label ? box.op : ""}`);
    twoBars(row, values, text.short, most);
  }

  function refusal(place, r, why) {
    const box = place.append("div").attr("class", "refusal");
    const head = box.append("p").append(why ? "strong" : "button").text(why ?? r.name);
    if (!why) head.on("click", () => fx.find(r.name));
    box.append("p").text(`${text.counted(r.channels, "channel")} not merged: ${r.reason}`);
    if (r.where) box.append("p").attr("class", "soft").text(r.where);
  }

  return {swatch, dotted, bar, twoBars, table, width, groupRow, boxRow, refusal};
})();
