// The drawing as a PNG or SVG file, and the page as a PDF, by the browser's print dialogue.
"use strict";
fx.save = (() => {
  const VARIABLES = ["--back", "--card", "--ink", "--soft", "--line", "--frame", "--wire", "--focus", "--bad", "--none", "--loss", "--gain"];
  const MARGIN = 24, SIDE = 16000, AREA = 1.2e8; // pixels; browsers refuse larger canvases

  function drawing() { // the whole drawing, as it is coloured and highlighted now, as an SVG that stands by itself
    const {width, height} = fx.scene.laid, style = getComputedStyle(document.documentElement);
    const copy = document.getElementById("network").cloneNode(true);
    copy.querySelectorAll(".hit, title").forEach((node) => node.remove());
    copy.querySelectorAll("[tabindex]").forEach((node) => node.removeAttribute("tabindex"));
    copy.querySelector("#scene").removeAttribute("transform");
    const rules = document.createElementNS("http://www.w3.org/2000/svg", "style");
    rules.textContent = `svg { ${VARIABLES.map((v) => `${v}: ${style.getPropertyValue(v)};`).join(" ")} font-family: ${getComputedStyle(document.body).fontFamily}; }\n`
      + document.getElementById("drawing").textContent;
    copy.prepend(rules);
    const box = [-MARGIN, -MARGIN, width + 2 * MARGIN, height + 2 * MARGIN];
    for (const [name, value] of Object.entries({xmlns: "http://www.w3.org/2000/svg", viewBox: box.join(" "), width: box[2], height: box[3]})) copy.setAttribute(name, value);
    return {text: new XMLSerializer().serializeToString(copy), width: box[2], height: box[3]};
  }

  function download(blob, ending) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = `${fx.data.title.replace(/[^\w.-]+/g, "_") || "network"}.${ending}`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  }

  function svg() {
    download(new Blob([drawing().text], {type: "image/svg+xml"}), "svg");
  }

  async function png() {
    const {text, width, height} = drawing(), image = new Image();
    image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(text)}`;
    await image.decode();
    const scale = Math.min(2, SIDE / Math.max(width, height), Math.sqrt(AREA / (width * height)));
    const canvas = document.createElement("canvas"), pen = canvas.getContext("2d");
    [canvas.width, canvas.height] = [Math.ceil(width * scale), Math.ceil(height * scale)];
    pen.fillStyle = getComputedStyle(document.body).backgroundColor;
    pen.fillRect(0, 0, canvas.width, canvas.height);
    pen.drawImage(image, 0, 0, canvas.width, canvas.height);
    const blob = await new Promise((done) => canvas.toBlob(done, "image/png"));
    if (blob) download(blob, "png"); else fx.say("the browser cannot make a picture of this size; save an SVG");
  }

  let theme = null; // of the screen, while the page is printed
  const sheet = document.createElement("style");

  function shade(name) { // the heat map is a picture, and is drawn again in the theme's colours
    const isOther = document.documentElement.dataset.theme !== name;
    document.documentElement.dataset.theme = name;
    if (isOther) fx.panel.show(fx.chosen);
  }

  function beforePrint() { // a page as large as the drawing, in light colours
    if (theme !== null) return;
    const {width, height} = fx.scene.laid;
    theme = document.documentElement.dataset.theme;
    shade("light");
    d3.select("#network").attr("viewBox", `0 0 ${width} ${height}`).style("width", `${width}px`).style("height", `${height}px`);
    d3.select("#scene").attr("transform", null);
    const side = Math.min(Math.max(width + 80, 820), 14_000);
    sheet.textContent = `@page { size: ${side}px ${Math.min(Math.max(height + 320, 1060), 14_000)}px; margin: 30px; }`;
    document.head.append(sheet);
  }

  function afterPrint() {
    if (theme === null) return;
    shade(theme);
    theme = null;
    sheet.remove();
    d3.select("#network").attr("viewBox", null).style("width", null).style("height", null);
    d3.select("#scene").attr("transform", fx.camera.at());
  }

  window.addEventListener("beforeprint", beforePrint);
  window.addEventListener("afterprint", afterPrint);
  return {svg, png, pdf: () => window.print()};
})();
