// Decoders of the paper in the browser: the same three layers as vaenb/models.py, in typed arrays, and latents to feed them.
"use strict";

const Explorer = (() => {
  // --- the model -------------------------------------------------------------------------------------------------

  function array({dtype, shape, base64}) {
    if (dtype !== "float32") throw new Error(`expected float32, not ${dtype}`);
    const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
    return {shape, data: new Float32Array(bytes.buffer)};
  }

  // Error function to 1.5e-7: Abramowitz and Stegun, formula 7.1.26.
  function erf(x) {
    const t = 1 / (1 + 0.3275911 * Math.abs(x));
    const y = ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592) * t;
    return Math.sign(x) * (1 - y * Math.exp(-x * x));
  }

  const gelu = (x) => 0.5 * x * (1 + erf(x * Math.SQRT1_2));

  // Zero-padded convolution of stride 1, with one position of padding on each side. input: channels × side × side.
  function convolution(input, side, weight, bias) {
    const [out, channels, kernel] = weight.shape;
    const grown = side + 3 - kernel;
    const output = new Float32Array(out * grown * grown);
    for (let o = 0; o < out; o++) {
      for (let y = 0; y < grown; y++) {
        for (let x = 0; x < grown; x++) {
          let sum = bias.data[o];
          for (let c = 0; c < channels; c++) {
            for (let i = 0; i < kernel; i++) {
              const row = y + i - 1;
              if (row < 0 || row >= side) continue;
              for (let j = 0; j < kernel; j++) {
                const column = x + j - 1;
                if (column < 0 || column >= side) continue;
                sum += weight.data[((o * channels + c) * kernel + i) * kernel + j] * input[(c * side + row) * side + column];
              }
            }
          }
          output[(o * grown + y) * grown + x] = sum;
        }
      }
    }
    return {output, side: grown};
  }

  // Doubles the side: a 2×2 convolution to four phases, a shuffle, and one pixel less on each side.
  function up(input, side, weight, bias) {
    const phases = convolution(input, side, weight, bias);
    const channels = weight.shape[0] / 4, wide = 2 * side;
    const output = new Float32Array(channels * wide * wide);
    for (let c = 0; c < channels; c++) {
      for (let y = 0; y < wide; y++) {
        for (let x = 0; x < wide; x++) {
          const phase = (2 * ((y + 1) % 2) + ((x + 1) % 2)) * channels + c;
          output[(c * wide + y) * wide + x] = phases.output[(phase * phases.side + ((y + 1) >> 1)) * phases.side + ((x + 1) >> 1)];
        }
      }
    }
    return {output, side: wide};
  }

  // Latents of a model as explorer.json has it -> probabilities of ink, 28 × 28.
  function decode(model, z) {
    const w = model.weights;
    let h;
    if (model.shape.length === 3) {
      h = convolution(z, model.shape[1], w["from_latent.0.weight"], w["from_latent.0.bias"]);
    } else {
      const {shape: [out, size], data} = w["from_latent.0.weight"];
      const channels = w["decoder.1.phases.weight"].shape[1], positions = out / channels;
      const output = new Float32Array(out);
      for (let o = 0; o < out; o++) {  // the channels of a position are together, in maps they are apart
        let sum = w["from_latent.0.bias"].data[o];
        for (let i = 0; i < size; i++) sum += data[o * size + i] * z[i];
        output[(o % channels) * positions + Math.floor(o / channels)] = sum;
      }
      h = {output, side: Math.round(Math.sqrt(positions))};
    }
    for (const layer of ["decoder.1.phases", "decoder.3.phases"]) {
      h = up(h.output.map(gelu), h.side, w[`${layer}.weight`], w[`${layer}.bias`]);
    }
    return h.output.map((logit) => 1 / (1 + Math.exp(-logit)));
  }

  // --- where latents come from -----------------------------------------------------------------------------------

  const uniform = (n) => Math.floor(Math.random() * n);
  const normal = () => Math.sqrt(-2 * Math.log(1 - Math.random())) * Math.cos(2 * Math.PI * Math.random());

  function gaussians({weights, means, factors}) {
    const [components, size] = means.shape;
    let rest = Math.random(), k = 0;
    while (k < components - 1 && (rest -= weights.data[k]) > 0) k++;
    const noise = Array.from({length: size}, normal);
    const z = new Float32Array(size);
    const each = factors.shape[1];
    for (let i = 0; i < size; i++) {
      z[i] = means.data[k * size + i];
      for (let j = 0; j <= i; j++) z[i] += factors.data[k * each + (i * (i + 1)) / 2 + j] * noise[j];
    }
    return z;
  }

  const SOURCES = {
    real: {
      title: "a real digit",
      says: "Latents of a real digit, z ~ q(z|x): the decoder draws it. Nothing is wrong with the decoder.",
      draw: (model) => {
        const image = uniform(model.pool.shape[0]);
        return model.pool.data.slice(image * model.size, (image + 1) * model.size);
      },
    },
    shuffled: {
      title: "positions shuffled",
      says: "Every latent is of a real digit, each of another one. All marginals are right and all dependence is gone: " +
        "the pieces no longer belong together.",
      draw: (model) => Float32Array.from({length: model.size}, (_, i) => model.pool.data[uniform(model.pool.shape[0]) * model.size + i]),
    },
    prior: {
      title: "N(0, I)",
      says: "Independent draws from the prior, all alike: neither the right marginals nor any dependence.",
      draw: (model) => Float32Array.from({length: model.size}, normal),
    },
    gaussian: {
      title: "one Gaussian",
      says: "A Gaussian with the mean and covariance of real latents: dependence to second order.",
      draw: (model) => gaussians(model.priors["full Gaussian"]),
    },
    mixture: {
      title: "learned prior",
      says: "A mixture of Gaussians learned from real latents. Same decoder, not one weight changed.",
      draw: (model) => gaussians(model.priors.mixture),
    },
  };

  function load(content) {
    const models = {};
    for (const [title, model] of Object.entries(content)) {
      const each = (entries) => Object.fromEntries(Object.entries(entries).map(([name, value]) => [name, array(value)]));
      models[title] = {
        shape: model.latent_shape,
        size: model.latent_shape.reduce((a, b) => a * b),
        weights: each(model.decoder),
        pool: array(model.examples.draws),
        priors: Object.fromEntries(Object.entries(model.priors).map(([name, prior]) => [name, each(prior)])),
      };
      models[title].pool.shape[0] = model.examples.labels.length;
    }
    return models;
  }

  // --- what the reader sees --------------------------------------------------------------------------------------

  function paint(canvas, values, width, colour) {
    const height = values.length / width;
    canvas.width = width;
    canvas.height = height;
    const context = canvas.getContext("2d"), image = context.createImageData(width, height);
    values.forEach((value, i) => image.data.set([...colour(value), 255], 4 * i));
    context.putImageData(image, 0, 0);
  }

  const ink = (p) => Array(3).fill(Math.round(255 * p));

  // Orange for positive, blue for negative, from white at 0: apart for colour-blind readers, too.
  function diverging(value) {
    const t = Math.max(-1, Math.min(1, value / 3));
    const end = t > 0 ? [179, 88, 6] : [33, 102, 172];
    return end.map((c) => Math.round(255 + (c - 255) * Math.abs(t)));
  }

  function start(root, content) {
    const models = load(content), titles = Object.keys(models);
    const find = (name) => root.querySelector(`[data-role=${name}]`);
    const [map, digit, gallery, says, slider, label] = ["map", "digit", "gallery", "says", "slider", "label"].map(find);
    const state = {title: titles[0], source: "real", z: null, chosen: 0};
    const columns = (model) => (model.shape.length === 3 ? model.shape[2] : 5);

    function choices(name, entries, current, choose) {
      for (const [value, title] of entries) {
        const button = document.createElement("button");
        button.type = "button";
        button.textContent = title;
        button.dataset.value = value;
        button.setAttribute("aria-pressed", String(value === current));
        button.addEventListener("click", () => {
          for (const other of find(name).children) other.setAttribute("aria-pressed", String(other === button));
          choose(value);
        });
        find(name).append(button);
      }
    }

    function show() {
      const model = models[state.title];
      paint(map, state.z, columns(model), diverging);
      paint(digit, decode(model, state.z), 28, ink);
      const width = columns(model), row = Math.floor(state.chosen / width) + 1, column = (state.chosen % width) + 1;
      slider.value = state.z[state.chosen];
      const where = model.shape.length === 3 ? `row ${row}, column ${column}` : `latent ${state.chosen + 1}, which has no place`;
      label.textContent = `${where}: ${state.z[state.chosen].toFixed(2).replace("-", "−")}`;
      const cell = find("cell");
      cell.style.width = `${100 / width}%`;
      cell.style.height = `${(100 * width) / model.size}%`;
      cell.style.left = `${(100 * (column - 1)) / width}%`;
      cell.style.top = `${(100 * (row - 1) * width) / model.size}%`;
    }

    function draw() {
      const model = models[state.title], source = SOURCES[state.source];
      state.z = source.draw(model);
      says.textContent = source.says;
      for (const canvas of gallery.children) paint(canvas, decode(model, source.draw(model)), 28, ink);
      show();
    }

    function set(index, value) {
      state.chosen = index;
      state.z[index] = Math.max(-4, Math.min(4, value));
      show();
    }

    function at(event) {
      const box = map.getBoundingClientRect(), model = models[state.title], width = columns(model);
      const inside = (x, n) => Math.max(0, Math.min(n - 1, Math.floor(x * n)));
      const column = inside((event.clientX - box.left) / box.width, width);
      return inside((event.clientY - box.top) / box.height, model.size / width) * width + column;
    }

    let held = null;
    map.addEventListener("pointerdown", (event) => {
      const index = at(event);
      held = {index, from: event.clientY, value: state.z[index]};
      map.setPointerCapture(event.pointerId);
      set(index, state.z[index]);
    });
    map.addEventListener("pointermove", (event) => {
      if (held) set(held.index, held.value + (held.from - event.clientY) / 25);
    });
    for (const end of ["pointerup", "pointercancel"]) map.addEventListener(end, () => { held = null; });
    map.addEventListener("keydown", (event) => {
      const model = models[state.title], width = columns(model);
      const step = {ArrowLeft: -1, ArrowRight: 1, ArrowUp: -width, ArrowDown: width}[event.key];
      if (step === undefined) return;
      event.preventDefault();
      const index = state.chosen + step;
      if (index >= 0 && index < model.size) set(index, state.z[index]);
    });
    slider.addEventListener("input", () => set(state.chosen, Number(slider.value)));
    find("again").addEventListener("click", draw);
    choices("models", titles.map((title) => [title, title]), state.title, (title) => {
      Object.assign(state, {title, chosen: 0});
      draw();
    });
    choices("sources", Object.entries(SOURCES).map(([name, {title}]) => [name, title]), state.source, (source) => {
      state.source = source;
      draw();
    });
    for (let i = 0; i < 12; i++) gallery.append(document.createElement("canvas"));
    draw();
    return {state, models, set};
  }

  return {load, decode, start, sources: SOURCES};
})();

if (typeof module !== "undefined") module.exports = Explorer;
