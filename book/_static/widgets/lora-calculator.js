// What an adapter costs: hidden size, rank, target modules and depth -> parameters, bytes, operations.
//
// config: {width?, depth?, rank?, targets?: [names]}. The formulas are those of utils.lora.count and
// utils.minigpt.flops_per_token, for a MiniGPT of 2,048 tokens and a context of 256 whose MLP is four times as wide as the model.
(() => {
  'use strict';
  const {element, uid} = Course;
  const VOCABULARY = 2048;
  const CONTEXT = 256;
  const SHAPES = { // [in, out] of each layer, in hidden sizes
    q_proj: [1, 1], k_proj: [1, 1], v_proj: [1, 1], o_proj: [1, 1], up_proj: [1, 4], down_proj: [4, 1],
  };
  const SLIDERS = {
    width: {label: 'hidden size d', min: 16, max: 4096, step: 16, value: 144},
    rank: {label: 'rank r', min: 1, max: 128, step: 1, value: 8},
    depth: {label: 'depth (layers)', min: 1, max: 48, step: 1, value: 4},
  };

  function cost({width, rank, depth, targets}) {
    const adapter = depth * targets.reduce((sum, name) => sum + rank * width * (SHAPES[name][0] + SHAPES[name][1]), 0);
    const matrices = depth * (4 * width ** 2 + 2 * width * 4 * width);
    const base = VOCABULARY * width + CONTEXT * width + matrices + (2 * depth + 1) * width;
    return {
      adapter,
      base,
      adapter_bytes: 4 * adapter,
      optimizer_bytes: 8 * adapter,
      full_optimizer_bytes: 8 * base,
      adapter_flops: 2 * adapter,
      base_flops: 2 * (matrices + VOCABULARY * width + depth * 2 * CONTEXT * width),
    };
  }

  const whole = (value) => value.toLocaleString('en');
  function bytes(value) {
    const units = ['bytes', 'kB', 'MB', 'GB', 'TB'];
    let i = 0;
    let v = value;
    while (v >= 1000 && i < units.length - 1) { v /= 1000; i += 1; }
    return `${i ? v.toPrecision(3) : v} ${units[i]}`;
  }
  function percent(part, all) {
    const p = (100 * part) / all;
    return `${p >= 10 ? p.toFixed(0) : p.toPrecision(2)}%`;
  }

  Course.loraCost = cost;
  Course.widget('lora-calculator', (root, config) => {
    const state = {targets: config.targets || ['q_proj', 'v_proj']};
    const titleId = uid('lora-title');
    const numbers = element('dl', {class: 'lora-numbers', 'aria-live': 'polite'});
    const sliders = element('div', {class: 'lora-sliders'});
    for (const [name, spec] of Object.entries(SLIDERS)) {
      state[name] = config[name] || spec.value;
      const id = uid('lora-slider');
      const shown = element('output', {for: id, text: whole(state[name])});
      const input = element('input', {type: 'range', id, 'data-slider': name, min: spec.min, max: spec.max, step: spec.step});
      input.value = String(state[name]);
      input.addEventListener('input', () => {
        state[name] = Number(input.value);
        shown.textContent = whole(state[name]);
        show();
      });
      sliders.append(element('label', {for: id, text: spec.label}), input, shown);
    }
    const boxes = element('fieldset', {class: 'lora-targets'}, element('legend', {text: 'target modules'}),
      ...Object.keys(SHAPES).map((name) => {
        const box = element('input', {type: 'checkbox', value: name});
        box.checked = state.targets.includes(name);
        box.addEventListener('change', () => {
          state.targets = [...boxes.querySelectorAll('input:checked')].map((each) => each.value);
          show();
        });
        return element('label', {}, box, element('code', {text: name}));
      }));
    root.setAttribute('role', 'group');
    root.setAttribute('aria-labelledby', titleId);
    root.append(element('p', {class: 'widget-title', id: titleId, text: 'What does an adapter cost?'}),
      element('p', {class: 'widget-note',
        text: 'A MiniGPT with 2,048 tokens, a context of 256 and an MLP of width 4d. Float32 throughout; Adam keeps two numbers for each trainable one.'}),
      sliders, boxes, numbers);

    function show() {
      const c = cost(state);
      const fits = state.rank <= state.width;
      const rows = [
        ['trainable', `${whole(c.adapter)} of ${whole(c.base)} parameters (${percent(c.adapter, c.base)})`],
        ['adapter file', bytes(c.adapter_bytes)],
        ['Adam', `${bytes(c.optimizer_bytes)} (full fine-tuning: ${bytes(c.full_optimizer_bytes)})`],
        ['forward', `${whole(c.adapter_flops)} operations a token on top of ${whole(c.base_flops)} (+${percent(c.adapter_flops, c.base_flops)}); merged: none`],
      ];
      if (!state.targets.length) rows.push(['note', 'No target module is chosen: nothing would be trained.']);
      if (!fits) rows.push(['note', 'The rank is above the hidden size: the package refuses it.']);
      else if (2 * state.rank >= state.width) rows.push(['note', 'From rank d/2 on, the adapter of a square layer is as large as the layer.']);
      numbers.replaceChildren(...rows.flatMap(([term, text]) => [element('dt', {text: term}), element('dd', {text})]));
      root.dataset.cost = JSON.stringify(c);
    }
    show();
  });
})();
