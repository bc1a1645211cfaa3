// The channels of a group: which was merged into which, and the heat map of their similarity.
"use strict";
fx.channels = (() => {
  function heat(panel, g) {
    const {channels, kept, cosines} = g.likeness, n = channels.length, shown = fx.merged && !g.components;
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
    const hint = panel.append("p").attr("class", "soft").text(`Point at a cell to see its channels. ${shown ? `${[...kept].filter((c) => c === "1").length} of them are kept.` : ""}`);
    d3.select(canvas).on("pointermove", (event) => {
      const [x, y] = d3.pointer(event), side = canvas.clientWidth / n;
      const i = Math.max(0, Math.min(n - 1, Math.floor(y / side))), j = Math.max(0, Math.min(n - 1, Math.floor(x / side)));
      const fate = (at) => shown ? (kept[at] === "1" ? " (kept)" : " (dropped)") : "";
      hint.text(`channels ${channels[i]}${fate(i)} and ${channels[j]}${fate(j)}: cosine ${value(i, j).toFixed(2)}`);
    });
  }

  function partners(panel, g) {
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

  return {heat, partners};
})();
