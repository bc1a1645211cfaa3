// Which part of the drawing is seen: zoom, pan, and the small map beside it.
"use strict";
fx.camera = (() => {
  const svg = d3.select("#network"), root = d3.select("#scene"), map = d3.select("#map");
  const still = map.append("g");
  map.append("rect").attr("class", "window");
  const READABLE = 0.45, CLOSE = 1.1, SMALLEST = 0.1; // scales
  const calm = window.matchMedia("(prefers-reduced-motion: reduce)");
  const zoom = d3.zoom().scaleExtent([0.03, 3]).on("zoom", (event) => {
    root.attr("transform", event.transform);
    drawWindow();
  });
  svg.call(zoom).on("dblclick.zoom", null).on("click", (event) => { if (event.target === svg.node()) fx.choose(null); });

  const extent = () => svg.node().getBoundingClientRect();
  const at = () => d3.zoomTransform(svg.node());

  function drawWindow() {
    const t = at(), {width, height} = extent();
    map.select(".window").attr("x", -t.x / t.k).attr("y", -t.y / t.k).attr("width", width / t.k).attr("height", height / t.k);
  }

  function draw(laid, path) { // the map: outer frames, arrows that carry groups, boxes
    const scale = Math.min(120 / laid.width, (extent().height - 24) / laid.height, 0.3);
    map.attr("width", Math.max(laid.width * scale, 40)).attr("height", laid.height * scale).attr("viewBox", `0 0 ${laid.width} ${laid.height}`);
    still.selectAll("*").remove();
    still.selectAll(null).data(laid.frames.filter((f) => f.depth === 0)).join("rect").attr("x", (f) => f.x).attr("y", (f) => f.y)
      .attr("width", (f) => f.width).attr("height", (f) => f.height).attr("class", "ground").style("stroke-width", 1 / scale);
    still.selectAll(null).data(laid.wires.filter((w) => w.groups.size)).join("path").attr("class", "line").attr("d", (w) => path(w.points))
      .style("stroke", (w) => fx.colour.wire(w.groups) ?? "var(--wire)").style("stroke-width", 1.6 / scale);
    still.selectAll(null).data(laid.items).join("rect").attr("class", "dot").attr("x", (d) => d.x).attr("y", (d) => d.y)
      .attr("width", (d) => d.width).attr("height", (d) => d.height);
    drawWindow();
  }

  function mark(group) { // dim what is not of a group; null: nothing
    still.classed("dimmed", group !== null);
    still.selectAll(".dot").classed("on", (item) => item.groups.has(group)).classed("via", (item) => item.via.has(group))
      .style("fill", (item) => fx.colour.dot(item, group));
    still.selectAll(".line").classed("on", (w) => w.groups.has(group))
      .style("stroke", (w) => fx.colour.wire(w.groups, group ?? undefined) ?? "var(--wire)");
  }

  function moveTo(x, y, k, slowly) { // zoom to scale k with the point (x, y) in the middle of the window
    const {width, height} = extent(), to = d3.zoomIdentity.translate(width / 2 - x * k, height / 2 - y * k).scale(k);
    (slowly && !calm.matches ? svg.transition().duration(280) : svg.interrupt()).call(zoom.transform, to);
  }

  function fit() {
    const {width, height} = extent(), {laid} = fx.scene;
    moveTo(laid.width / 2, laid.height / 2, Math.min(width / laid.width, height / laid.height, 1.2));
  }

  function start() { // show the whole network if it is legible at that scale, else its top
    const {width, height} = extent(), {laid} = fx.scene;
    if (Math.min(width / laid.width, height / laid.height) >= READABLE) return fit();
    const k = Math.max(READABLE, Math.min(1, width / laid.width)), first = laid.items[0];
    moveTo(laid.width * k <= width ? laid.width / 2 : first.x + first.width / 2, height / 2 / k, k);
  }

  function show(box) {
    const item = fx.scene.laid.items.find((i) => i.boxes.includes(box));
    moveTo(item.x + item.width / 2, item.y + item.height / 2, Math.max(at().k, 0.9), true);
  }

  function showAll(items) { // some boxes as large as they fit
    if (!items.length) return;
    const {width, height} = extent(), margin = 30;
    const [left, right] = [d3.min(items, (i) => i.x) - margin, d3.max(items, (i) => i.x + i.width) + margin];
    const [top, bottom] = [d3.min(items, (i) => i.y) - margin, d3.max(items, (i) => i.y + i.height) + margin];
    const k = Math.max(Math.min(width / (right - left), height / (bottom - top), CLOSE), SMALLEST);
    moveTo((left + right) / 2, (top + bottom) / 2, k, true);
  }

  map.on("click", (event) => {
    const [x, y] = d3.pointer(event, map.node());
    moveTo(x, y, at().k, true);
  });
  window.addEventListener("resize", () => { if (fx.scene.laid) fx.scene.colour(); });

  return {
    draw, mark, fit, start, show, showAll, at,
    keep: (old, id) => { // what was toggled stays under the pointer
      const now = fx.scene.place(id), t = at();
      if (old && now) svg.call(zoom.transform, d3.zoomIdentity.translate(t.x + (old.x - now.x) * t.k, t.y + (old.y - now.y) * t.k).scale(t.k));
    },
    zoomBy: (factor) => svg.call(zoom.scaleBy, factor),
    panBy: (x, y) => svg.call(zoom.translateBy, x / at().k, y / at().k),
  };
})();
