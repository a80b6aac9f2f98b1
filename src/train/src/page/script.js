"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const element = (name, properties, ...children) => {
    const made = Object.assign(document.createElement(name), properties);
    made.append(...children);
    return made;
  };

  // The curves: a chart is left out while nothing of it was measured.
  const CHARTS = [
    {title: "Loss", series: [["loss", "training", "--accent-faint"], ["smoothedLoss", "smoothed", "--accent"], ["priorLoss", "class pictures", "--third"], ["evaluationLoss", "fixed noise", "--second", true]]},
    {title: "Learning rate", series: [["learningRate", "learning rate", "--accent"]]},
    {title: "Gradient norm, before clipping", series: [["gradientNorm", "gradient norm", "--accent"]]},
    {title: "Seconds per step", series: [["stepSeconds", "seconds", "--accent"]]},
  ];
  const number = (value) => value == null ? "–" : String(Number(value.toPrecision(6)));
  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const charts = new Map();
  let live = JSON.parse(byId("data").textContent);
  const measured = (column) => live.curves[column].some((value) => value != null);
  const width = (holder) => Math.max(200, holder.clientWidth - 16);
  const HEIGHT = 240;

  function chart({title, series}, holder) {
    const axis = (more) => ({stroke: () => color("--faint"), grid: {stroke: () => color("--line"), width: 1}, ticks: {stroke: () => color("--line"), width: 1}, ...more});
    const options = {
      title, width: width(holder), height: HEIGHT,
      scales: {x: {time: false}},
      axes: [axis({}), axis({size: 64, values: (_, ticks) => ticks.map((tick) => tick == null ? "" : number(tick))})],
      series: [{label: "step", value: (_, value) => value == null ? "–" : String(value)}].concat(series.map(([, label, stroke, points]) => ({
        label, stroke: () => color(stroke), width: points ? 2 : 1.5, spanGaps: true, value: (_, value) => number(value),
        points: points ? {show: true, size: 8, fill: () => color(stroke)} : {},
      }))),
    };
    return new uPlot(options, columns(series), holder);
  }
  const columns = (series) => [live.curves.step, ...series.map(([column]) => live.curves[column])];

  function drawCurves() {
    byId("no-curves").hidden = live.curves.step.length > 0;
    for (const description of CHARTS) {
      const series = description.series.filter(([column]) => measured(column));
      if (series.length === 0) continue;
      const known = charts.get(description.title);
      if (known && known.series.length === series.length) {
        // Who has zoomed in stays there.
        const {chart: {data: [steps], scales: {x}}} = known;
        const whole = x.min <= steps[0] && x.max >= steps[steps.length - 1];
        known.chart.setData(columns(series), whole);
        if (!whole) known.chart.redraw();
        continue;
      }
      const holder = known ? known.holder : byId("curves").appendChild(element("div", {}));
      if (known) known.chart.destroy();
      charts.set(description.title, {holder, series, chart: chart({title: description.title, series}, holder)});
    }
  }
  const forEachChart = (act) => charts.forEach(({chart, holder}) => act(chart, holder));
  new ResizeObserver(() => forEachChart((chart, holder) => {
    if (chart.width !== width(holder)) chart.setSize({width: width(holder), height: HEIGHT});
  })).observe(byId("curves"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => forEachChart((chart) => chart.redraw()));

  // Validation pictures: one slider over the steps, a picture for each prompt.
  const gallery = JSON.parse(byId("gallery").textContent);
  function showStep(index) {
    const [step, pictures] = gallery.steps[index];
    byId("slider-step").value = `step ${step}`;
    pictures.forEach((picture, prompt) => {
      const image = byId("pictures").children[prompt].firstChild;
      image.hidden = !picture;
      if (picture) Object.assign(image, {src: picture.uri, width: picture.width, height: picture.height, className: picture.width < 200 ? "small" : ""});
    });
  }
  if (gallery.steps.length > 0) {
    const slider = byId("slider");
    for (const prompt of gallery.prompts) byId("pictures").append(element("figure", {}, element("img", {alt: prompt}), element("figcaption", {textContent: prompt})));
    slider.max = gallery.steps.length - 1;
    const kept = Number(sessionStorageGet("slider"));
    slider.value = kept > 0 && kept < gallery.steps.length ? kept - 1 : slider.max;
    slider.addEventListener("input", () => {
      showStep(Number(slider.value));
      // The end moves on with the run; another place stays.
      sessionStorageSet("slider", slider.value === slider.max ? 0 : Number(slider.value) + 1);
    });
    showStep(Number(slider.value));
  }
  // Storage may be forbidden to files.
  function sessionStorageGet(key) { try { return sessionStorage.getItem(key); } catch { return null; } }
  function sessionStorageSet(key, value) { try { sessionStorage.setItem(key, value); } catch { /* not kept */ } }

  drawCurves();
  window.finetune = {charts, gallery};

  // Served by the trainer: the numbers follow the run.
  const SECONDS = 5;
  async function follow() {
    let next;
    try {
      next = await (await fetch("report.json", {cache: "no-store"})).json();
    } catch {
      byId("status").textContent = "the trainer does not answer: it has ended, or the connection has; the report is in its output folder";
      return;
    }
    if (next.edition !== live.edition) {
      location.reload();
      return;
    }
    live = next;
    byId("status").textContent = live.status;
    byId("numbers").replaceChildren(...live.numbers.map(([name, value]) => element("div", {}, element("dt", {textContent: name}), element("dd", {textContent: value}))));
    drawCurves();
    if (!live.done) setTimeout(follow, SECONDS * 1000);
  }
  if (location.protocol.startsWith("http") && !live.done) setTimeout(follow, SECONDS * 1000);
})();
