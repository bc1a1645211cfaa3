// The drawing of the network with d3: boxes, arrows and frames, their colours, and what is highlighted.
"use strict";
fx.scene = (() => {
  const svg = d3.select("#network"), defs = svg.append("defs");
  const root = svg.append("g").attr("id", "scene");
  const layers = ["frames", "wires", "titles", "boxes"].map((name) => root.append("g").attr("class", name));
  const {groups, boxes: all, refusals} = fx.data;
  let laid = null;

  function hatch(id, colour) {
    const pattern = defs.append("pattern").attr("id", id).attr("width", 8).attr("height", 8)
      .attr("patternUnits", "userSpaceOnUse").attr("patternTransform", "rotate(45)");
    pattern.append("rect").attr("width", 8).attr("height", 8).attr("fill", colour);
    pattern.append("line").attr("class", "hatch").attr("y2", 8).attr("x1", 4).attr("x2", 4);
  }
  groups.forEach((g, at) => { if (g.refused) hatch(`hatch${at}`, g.colour); });
  hatch("blank", "var(--bad)");
  const paint = (at) => groups[at].refused ? `url(#hatch${at})` : groups[at].colour;

  function path(points) { // horizontal and vertical lines with rounded corners
    const p = d3.path(), r = 7;
    p.moveTo(points[0].x, points[0].y);
    for (let i = 1; i < points.length - 1; i++) p.arcTo(points[i].x, points[i].y, points[i + 1].x, points[i + 1].y,
      Math.min(r, ...[-1, 1].map((d) => Math.hypot(points[i + d].x - points[i].x, points[i + d].y - points[i].y) / 2)));
    p.lineTo(points.at(-1).x, points.at(-1).y - 6);
    return p.toString();
  }

  function key(selection, act) {
    selection.attr("tabindex", 0).attr("role", "button").on("keydown", function (event, d) {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); event.stopPropagation(); act(event, d); }
    });
  }

  function drawFrames() {
    const frames = layers[0].selectAll("g.frame").data(laid.frames, (f) => f.id).join("g")
      .attr("class", (f) => `frame${f.depth % 2 ? " odd" : ""}`).attr("data-frame", (f) => f.frame);
    frames.selectAll("*").remove();
    frames.append("rect").attr("x", (f) => f.x).attr("y", (f) => f.y).attr("width", (f) => f.width)
      .attr("height", (f) => f.height).attr("rx", 8);
    const title = layers[2].selectAll("g.title").data(laid.frames, (f) => f.id).join("g") // drawn above the arrows
      .attr("class", (f) => `title${f.depth % 2 ? " odd" : ""}`).attr("aria-expanded", "true")
      .attr("aria-label", (f) => `Collapse ${fx.frames.get(f.frame).label}`);
    title.selectAll("*").remove();
    title.append("rect").attr("x", (f) => f.x + 1).attr("y", (f) => f.y + 1).attr("width", (f) => f.width - 2)
      .attr("height", 24).attr("rx", 7);
    title.append("text").attr("x", (f) => f.x + 10).attr("y", (f) => f.y + 18).text((f) => `− ${fx.frames.get(f.frame).label}`);
    title.on("click", (event, f) => fx.toggle(f.frame));
    key(title, (event, f) => fx.toggle(f.frame));
  }

  function drawWires() {
    const wires = layers[1].selectAll("g.wire").data(laid.wires, (w) => w.id).join("g").attr("class", "wire")
      .attr("data-groups", (w) => [...w.groups].join(" "));
    wires.selectAll("*").remove();
    wires.each(function (w) {
      const here = d3.select(this), carried = [...w.groups], line = path(w.points);
      here.append("path").attr("class", `arrow${carried.length ? " carrying" : ""}`).attr("d", line);
      const {x, y} = w.points.at(-1);
      here.append("path").attr("class", "tip").attr("d", `M${x - 5},${y - 8}L${x},${y}L${x + 5},${y - 8}Z`);
      here.append("path").attr("class", "hit").attr("d", line);
      const names = carried.slice(0, 6).map((g) => groups[g].name);
      here.append("title").text([names.join(", "), w.through && `through ${w.through}`].filter(Boolean).join("\n"));
      if (!carried.length) return;
      here.on("click", () => fx.choose({group: fx.chosenGroup(carried)}))
        .on("mouseenter", () => mark(fx.chosenGroup(carried))).on("mouseleave", () => mark());
    });
  }

  function stripe(here, item, some, y) {
    const width = (item.width - 12) / some.length;
    here.selectAll(null).data(some).join("rect").attr("class", "stripe").attr("data-group", (g) => g)
      .attr("x", (_, i) => 6 + i * width).attr("y", y).attr("width", width).attr("height", 6).attr("rx", some.length > 1 ? 0 : 2)
      .attr("fill", paint).on("click", (event, g) => { event.stopPropagation(); fx.choose({group: g}); });
  }

  function drawBoxes() {
    const boxes = layers[3].selectAll("g.box").data(laid.items, (item) => item.id).join("g")
      .attr("class", (item) => ["box", item.closed !== undefined && "closed", item.refused.length && "refused"].filter(Boolean).join(" "))
      .attr("data-modules", (item) => item.boxes.flatMap((at) => all[at].modules).join("\n"))
      .attr("transform", (item) => `translate(${item.x},${item.y})`)
      .attr("aria-expanded", (item) => item.closed !== undefined ? "false" : null)
      .attr("aria-label", (item) => [item.label, item.details, item.figures.group.words].filter(Boolean).join(", "));
    boxes.selectAll("*").remove();
    boxes.each(function (item) {
      const here = d3.select(this), middle = item.width / 2;
      here.append("rect").attr("class", "body").attr("width", item.width).attr("height", item.height).attr("rx", 6);
      if (item.consumes.length) stripe(here, item, item.consumes.slice(0, 12), 0);
      if (item.holds.length) stripe(here, item, item.holds.slice(0, 12), item.height - 6);
      if (!item.holds.length && item.refused.length) here.append("rect").attr("class", "stripe refused").attr("x", 6)
        .attr("y", item.height - 6).attr("width", item.width - 12).attr("height", 6).attr("fill", "url(#blank)");
      const name = item.closed !== undefined ? `+ ${item.label}` : item.label;
      here.append("text").attr("class", "name").attr("x", middle).attr("y", 19.5).text(name);
      if (item.details) here.append("text").attr("class", "details").attr("x", middle).attr("y", 34).text(item.details);
      here.append("g").attr("class", "figure").attr("transform", `translate(0,${item.details ? 49 : 34})`);
      const why = item.refused.map((r) => refusals[r].reason);
      here.append("title").text([...all[item.boxes[0]].modules.slice(0, item.closed !== undefined ? 0 : 9),
        ...why.map((reason) => `not merged: ${reason}`)].join("\n"));
    });
    const act = (event, item) => item.closed !== undefined ? fx.toggle(item.closed) : fx.choose({box: item.boxes[0]});
    boxes.on("click", act).on("mouseenter", (event, item) => { if (item.closed === undefined) mark(fx.groupOf(item.boxes[0])); })
      .on("mouseleave", () => mark());
    key(boxes, act);
  }

  function colour() { // paint boxes and arrows by group, by error or by saving
    const {by} = fx.colour;
    fx.colour.scale(laid.items);
    root.classed("tinted", by !== "group");
    layers[3].selectAll("g.box").each(function (item) {
      const {words, share, width} = item.figures[by], here = d3.select(this), figure = here.select(".figure");
      here.select(".body").style("fill", fx.colour.body(item));
      figure.selectAll("*").remove();
      if (!words) return;
      const bar = share === undefined ? 0 : fx.network.BAR, left = (item.width - width - bar) / 2;
      if (bar) figure.append("rect").attr("class", "track").attr("x", left).attr("y", -7).attr("width", bar - 6).attr("height", 6).attr("rx", 2);
      if (bar) figure.append("rect").attr("class", "part").attr("x", left).attr("y", -7).attr("height", 6).attr("rx", 2)
        .attr("width", (bar - 6) * Math.min(Math.max(share, 0), 1));
      figure.append("text").attr("class", "details").attr("x", left + bar).style("text-anchor", "start").text(words);
    });
    fx.camera.draw(laid, path);
    mark();
  }

  function mark(hovered) { // highlight the members of the group under the pointer, or else of the selected group
    const group = hovered ?? fx.chosen?.group, isSome = group !== undefined && group !== null;
    root.classed("dimmed", isSome);
    layers[3].selectAll("g.box").classed("on", (item) => item.groups.has(group)).classed("via", (item) => item.via.has(group))
      .classed("sought", (item) => fx.chosen?.box !== undefined && item.boxes.includes(fx.chosen.box));
    layers[1].selectAll("g.wire").classed("on", (w) => w.groups.has(group)).each(function (w) {
      const shade = w.groups.size ? fx.colour.wire(w.groups, group) : null;
      d3.select(this).select(".arrow").style("stroke", shade);
      d3.select(this).select(".tip").style("fill", shade);
    }).filter((w) => w.groups.has(group)).raise();
    fx.camera.mark(isSome ? group : null);
  }

  function focus(id) {
    const node = layers[3].selectAll("g.box").filter((item) => item.id === id).node()
      || layers[2].selectAll("g.title").filter((f) => f.id === id).node();
    if (node) node.focus({preventScroll: true});
  }

  return {
    mark, colour, focus,
    draw: (found) => { laid = found; drawFrames(); drawWires(); drawBoxes(); colour(); },
    get laid() { return laid; },
    place: (id) => laid.items.find((i) => i.id === id) || laid.frames.find((f) => f.id === id),
  };
})();
