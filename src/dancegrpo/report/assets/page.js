"use strict";
(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const MARGIN = { left: 52, right: 12, top: 8, bottom: 24 };
  const charts = JSON.parse(document.getElementById("data").textContent).charts;

  const format = (value, unit) => {
    if (value === null || value === undefined) return "–";
    if (unit === "percent") return (100 * value).toFixed(Math.abs(value) >= 0.1 || value === 0 ? 1 : 2) + "%";
    if (unit === "seconds") return Number(value.toPrecision(3)) + " s";
    if (unit === "ratio") return value.toFixed(6);
    if (unit === "megabytes") return Math.round(value).toLocaleString("en") + " MB";
    const size = Math.abs(value);
    return size !== 0 && (size < 1e-3 || size >= 1e6) ? value.toExponential(2) : String(Number(value.toPrecision(4)));
  };
  // Ticks are round numbers: as short as they can be.
  const tickLabel = (value, unit) => {
    if (unit === "percent") return Number((100 * value).toPrecision(6)) + "%";
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(1).replace(".0e", "e");
    return Number(value.toPrecision(8)).toLocaleString("en", { maximumFractionDigits: 8 });
  };
  const ticks = (low, high, count) => {
    const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999);
    const found = [];
    for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) found.push(k * step);
    return found;
  };
  const element = (name, attributes, parent) => {
    const node = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    parent.appendChild(node);
    return node;
  };
  const color = (index) => `var(--c${index % 7})`;
  const hue = (series, index) => color(series.color ?? index);

  // Exponential running mean without the bias towards its first value; gaps stay gaps.
  const smooth = (values) => {
    const count = values.filter((v) => v !== null).length;
    if (count < 20) return null;
    const keep = 1 - 1 / Math.min(20, Math.max(4, count / 12));
    let sum = 0, weight = 0;
    return values.map((value) => {
      if (value === null) return null;
      sum = keep * sum + (1 - keep) * value;
      weight = keep * weight + (1 - keep);
      return sum / weight;
    });
  };
  const stacked = (series) => {
    const total = series[0].values.map(() => 0);
    return series.map((line) => {
      const low = total.slice();
      line.values.forEach((value, i) => { total[i] += value ?? 0; });
      return { low, high: total.slice() };
    });
  };

  class Plot {
    constructor(box, chart) {
      Object.assign(this, { box, chart, at: null });
      this.smooth = chart.smoothed && chart.kind === "line" ? chart.series.map((s) => smooth(s.values)) : [];
      this.layers = chart.kind === "stack" ? stacked(chart.series) : null;
      this.tooltip = document.createElement("div");
      this.tooltip.className = "tooltip";
      this.tooltip.hidden = true;
      this.tooltip.setAttribute("role", "status");
      box.addEventListener("pointermove", (event) => this.point(event.clientX));
      box.addEventListener("pointerdown", (event) => this.point(event.clientX));
      box.addEventListener("pointerleave", () => this.show(null));
      box.addEventListener("blur", () => this.show(null));
      box.addEventListener("keydown", (event) => this.key(event));
    }
    domain() {
      const { chart } = this, all = [];
      if (this.layers) this.layers.forEach((layer) => all.push(...layer.high));
      else chart.series.forEach((s) => all.push(...s.values, ...(s.low ?? []), ...(s.high ?? [])));
      const known = all.filter((v) => v !== null);
      let low = Infinity, high = -Infinity;
      for (const v of known) { low = Math.min(low, v); high = Math.max(high, v); }
      // Ratios within rounding of 1 would fill the chart with noise.
      if (chart.unit === "ratio") { low = Math.min(low, 1 - 5e-6); high = Math.max(high, 1 + 5e-6); }
      if (chart.from_zero) { low = Math.min(0, low); high = Math.max(0, high); }
      // A reference far above the data would flatten the curve; then it stays outside, named in the legend.
      if (chart.reference && chart.reference[0] <= high + 0.5 * (high - low)) high = Math.max(high, chart.reference[0]);
      if (low === high && low === 0 && chart.reference) return [0, 1.2 * chart.reference[0]];
      if (low === high) {
        const pad = Math.abs(low) * 0.1 || 1;
        return chart.from_zero && low === 0 ? [0, chart.unit === "percent" ? 0.1 : 1] : [low - pad, high + pad];
      }
      const pad = 0.06 * (high - low);
      return [chart.from_zero && low === 0 ? 0 : low - pad, high + pad];
    }
    draw() {
      const { box, chart } = this;
      const width = box.clientWidth, height = box.clientHeight;
      if (!width) return;
      const [low, high] = this.domain(), x0 = chart.x[0], x1 = chart.x[chart.x.length - 1];
      const inner = { width: width - MARGIN.left - MARGIN.right, height: height - MARGIN.top - MARGIN.bottom };
      this.sx = (x) => MARGIN.left + (x1 === x0 ? 0.5 : (x - x0) / (x1 - x0)) * inner.width;
      this.sy = (y) => MARGIN.top + (1 - (y - low) / (high - low)) * inner.height;
      box.replaceChildren();
      const svg = element("svg", { viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" }, box);
      for (const y of ticks(low, high, 4)) {
        element("line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: this.sy(y), y2: this.sy(y) }, svg);
        element("text", { x: MARGIN.left - 7, y: this.sy(y) + 4, "text-anchor": "end" }, svg).textContent = tickLabel(y, chart.unit);
      }
      const wanted = x1 === x0 ? [x0] : ticks(x0, x1, Math.max(2, Math.floor(inner.width / 80))).filter(Number.isInteger);
      for (const x of wanted) {
        const label = element("text", { x: this.sx(x), y: height - 6, "text-anchor": "middle" }, svg);
        label.textContent = tickLabel(x, "number");
      }
      if (chart.reference && chart.reference[0] >= low && chart.reference[0] <= high) {
        const y = this.sy(chart.reference[0]);
        element("line", { class: "reference", x1: MARGIN.left, x2: width - MARGIN.right, y1: y, y2: y }, svg);
      }
      chart.series.forEach((series, index) => this.drawSeries(svg, series, index));
      this.cursor = element("g", {}, svg);
      box.appendChild(this.tooltip);
      this.show(this.at);
    }
    drawSeries(svg, series, index) {
      const fill = { style: `fill:${hue(series, index)}` }, places = series.x ?? this.chart.x;
      // Where the palette is used up, it starts again with dashes.
      const stroke = { style: `stroke:${hue(series, index)}${(series.color ?? 0) > 6 ? ";stroke-dasharray:6 4" : ""}` };
      if (this.layers) {
        const { low, high } = this.layers[index];
        element("path", { class: "area", d: this.area(low, high, places), ...fill }, svg);
        return;
      }
      if (series.low) element("path", { class: "band", d: this.area(series.low, series.high, places), ...fill }, svg);
      const mean = this.smooth[index];
      element("path", { class: mean ? "raw" : "strong", d: this.path(series.values, places), ...stroke }, svg);
      if (mean) element("path", { class: "strong", d: this.path(mean, places), ...stroke }, svg);
      if (places.length <= 12 || series.values.filter((v) => v !== null).length <= 2) {
        series.values.forEach((v, i) => {
          if (v !== null) element("circle", { cx: this.sx(places[i]), cy: this.sy(v), r: 3.2, ...fill }, svg);
        });
      }
    }
    path(values, places) {
      let d = "", pen = "M";
      values.forEach((value, i) => {
        if (value === null) { pen = "M"; return; }
        d += `${pen}${this.sx(places[i]).toFixed(1)},${this.sy(value).toFixed(1)}`;
        pen = "L";
      });
      return d;
    }
    // One closed shape for each stretch without gaps.
    area(low, high, places) {
      let d = "", run = [];
      const close = () => {
        const at = (i, y) => `${this.sx(places[i]).toFixed(1)},${this.sy(y).toFixed(1)}`;
        if (run.length === 1) {
          // A lone point has no width: it is drawn as a bar.
          const x = this.sx(places[run[0]]), half = this.layers ? 24 : 4;
          const [top, bottom] = [this.sy(high[run[0]]), this.sy(low[run[0]])].map((y) => y.toFixed(1));
          d += `M${x - half},${top}H${x + half}V${bottom}H${x - half}Z`;
        }
        if (run.length > 1) d += "M" + run.map((i) => at(i, high[i])).join("L") + "L" + run.reverse().map((i) => at(i, low[i])).join("L") + "Z";
        run = [];
      };
      low.forEach((value, i) => (value === null || high[i] === null ? close() : run.push(i)));
      close();
      return d;
    }
    point(clientX) {
      const x = clientX - this.box.getBoundingClientRect().left;
      let best = 0;
      this.chart.x.forEach((value, i) => {
        if (Math.abs(this.sx(value) - x) < Math.abs(this.sx(this.chart.x[best]) - x)) best = i;
      });
      this.show(best);
    }
    // Which value of a series belongs to the chart's place `at`: of one with places of its own the nearest, none beyond
    // its ends.
    index(series, at) {
      if (!series.x) return at;
      const x = this.chart.x[at], count = series.x.length;
      if (x < series.x[0] || x > series.x[count - 1]) return -1;
      const above = series.x.findIndex((value) => value >= x);
      return above > 0 && x - series.x[above - 1] <= series.x[above] - x ? above - 1 : above;
    }
    key(event) {
      const last = this.chart.x.length - 1, at = this.at ?? last;
      const moves = { ArrowLeft: Math.max(0, at - 1), ArrowRight: Math.min(last, at + 1), Home: 0, End: last };
      if (event.key === "Escape") this.show(null);
      if (!(event.key in moves)) return;
      event.preventDefault();
      this.show(moves[event.key]);
    }
    show(at) {
      this.at = at;
      this.tooltip.hidden = at === null;
      if (!this.cursor) return;
      this.cursor.replaceChildren();
      if (at === null) return;
      const { chart } = this, x = this.sx(chart.x[at]);
      element("line", { class: "cursor", x1: x, x2: x, y1: MARGIN.top, y2: this.box.clientHeight - MARGIN.bottom }, this.cursor);
      if (!this.layers) {
        chart.series.forEach((series, index) => {
          const k = this.index(series, at), value = series.values[k] ?? null, cx = series.x ? this.sx(series.x[k]) : x;
          if (value !== null) element("circle", { cx, cy: this.sy(value), r: 4, style: `fill:${hue(series, index)}` }, this.cursor);
        });
      }
      this.write(at);
      const room = this.box.clientWidth - this.tooltip.offsetWidth;
      const left = x + 12 <= room ? x + 12 : x - 12 - this.tooltip.offsetWidth;
      this.tooltip.style.left = `${Math.max(0, Math.min(room, left))}px`;
      this.tooltip.style.top = `${MARGIN.top}px`;
    }
    write(at) {
      const { chart } = this, head = document.createElement("strong");
      head.textContent = `${chart.axis} ${chart.x[at]}`;
      const rows = chart.series.map((series, index) => {
        const row = document.createElement("div"), swatch = document.createElement("i"), extra = document.createElement("em");
        swatch.style.background = hue(series, index);
        const k = this.index(series, at), mean = this.smooth[index]?.[k];
        if (typeof series.low?.[k] === "number") {
          extra.textContent = `  ${format(series.low[k], chart.unit)} to ${format(series.high[k], chart.unit)}`;
        } else if (mean !== null && mean !== undefined) {
          extra.textContent = `  mean ${format(mean, chart.unit)}`;
        }
        if (k >= 0 && series.x && series.x[k] !== chart.x[at]) extra.textContent += `  (at ${series.x[k]})`;
        row.append(swatch, `${series.name} ${format(series.values[k], chart.unit)}`, extra);
        return row;
      });
      if (this.layers) {
        const total = document.createElement("div");
        total.textContent = `total ${format(this.layers[this.layers.length - 1].high[at], chart.unit)}`;
        rows.push(total);
      }
      this.tooltip.replaceChildren(head, ...rows);
    }
  }

  const watch = new ResizeObserver((entries) => entries.forEach((entry) => entry.target.plot.draw()));
  for (const box of document.querySelectorAll(".plot")) {
    box.plot = new Plot(box, charts[Number(box.dataset.chart)]);
    box.plot.draw();
    watch.observe(box);
  }

  // A clip comes as a strip of its frames. One clock moves all of them, so before and after stay in step.
  class Clip {
    constructor(strip) {
      for (const name of ["frames", "columns", "width", "height", "gap", "fps"]) this[name] = Number(strip.dataset[name]);
      Object.assign(this, { strip, shown: null });
      const canvas = document.createElement("canvas");
      canvas.width = this.width;
      canvas.height = this.height;
      canvas.className = strip.className;
      canvas.dataset.frame = strip.dataset.frame;
      canvas.setAttribute("role", "img");
      canvas.setAttribute("aria-label", strip.alt);
      this.canvas = canvas;
    }
    draw(seconds) {
      const at = Math.min(this.frames - 1, Math.floor(seconds * this.fps + 1e-6));
      if (at === this.shown || !this.canvas.offsetWidth) return;
      this.shown = at;
      const { width, height, gap } = this;
      const x = (at % this.columns) * (width + gap), y = Math.floor(at / this.columns) * (height + gap);
      this.canvas.getContext("2d").drawImage(this.strip, x, y, width, height, 0, 0, width, height);
      this.canvas.dataset.at = at;
    }
  }
  const REST = 0.5; // seconds on the last frame: a clip's end is no jump of what it shows
  const play = (clips) => {
    const button = document.getElementById("play"), still = matchMedia("(prefers-reduced-motion: reduce)");
    const length = Math.max(...clips.map((clip) => clip.frames / clip.fps)) + REST;
    let playing = false, seconds = 0, before = null;
    const show = () => clips.forEach((clip) => clip.draw(seconds));
    const tick = (now) => {
      if (!playing) return;
      // A page that was hidden goes on where it was.
      seconds = (seconds + Math.min(0.25, (now - (before ?? now)) / 1000)) % length;
      before = now;
      show();
      requestAnimationFrame(tick);
    };
    const turn = (on) => {
      if (on && !playing) requestAnimationFrame(tick);
      playing = on;
      before = null;
      button.textContent = on ? "Pause" : "Play";
    };
    button.addEventListener("click", () => turn(!playing));
    still.addEventListener("change", () => { if (still.matches) turn(false); });
    document.getElementById("frame")?.addEventListener("input", show);
    button.parentElement.hidden = false;
    Promise.all(clips.map((clip) => clip.strip.decode())).catch(() => {}).then(() => {
      clips.forEach((clip) => clip.strip.replaceWith(clip.canvas));
      show();
      turn(!still.matches);
    });
  };

  const slider = document.getElementById("frame");
  if (slider) {
    const moments = slider.dataset.moments.split("|");
    slider.addEventListener("input", () => {
      document.getElementById("frame-label").textContent = moments[slider.value];
      slider.setAttribute("aria-valuetext", moments[slider.value]);
      for (const frame of document.querySelectorAll(".frame")) {
        frame.classList.toggle("shown", frame.dataset.frame === slider.value);
      }
    });
  }
  // After the slider's own listener: what it has just shown is drawn at once, paused or not.
  const strips = [...document.querySelectorAll("img.strip")];
  if (strips.length) play(strips.map((strip) => new Clip(strip)));
})();
