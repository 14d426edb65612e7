// Mesh planner: model, chips, mesh, batch, length, rank, remat -> bytes on each chip by term, and whether they fit.
//
// config: {model?, slice?, tp?, batch?, seq?, rank?, remat?}. The formula is utils.plan.estimate (chapter 13 derives it), the
// refusals are those of utils.sharding.check; tests hold both, and the sizes below, to the package and to the recorded plans.
(() => {
  'use strict';
  const {element, uid} = Course;
  const GIB = 2 ** 30;
  const CHUNK = 1024;
  const SIZES = ['layers', 'width', 'heads', 'kv_heads', 'head_size', 'mlp_width', 'vocab_size', 'context', 'tied', 'qkv_bias'];
  const MODELS = Object.fromEntries(Object.entries({
    'DeepSeek-R1-Distill-Qwen-1.5B': [28, 1536, 12, 2, 128, 8960, 151936, 131072, false, true],
    'DeepSeek-R1-Distill-Qwen-7B': [28, 3584, 28, 4, 128, 18944, 152064, 131072, false, true],
    'DeepSeek-R1-Distill-Llama-8B': [32, 4096, 32, 8, 128, 14336, 128256, 131072, false, false],
    'DeepSeek-R1-Distill-Qwen-14B': [48, 5120, 40, 8, 128, 13824, 152064, 131072, false, true],
    'DeepSeek-R1-Distill-Qwen-32B': [64, 5120, 40, 8, 128, 27648, 152064, 131072, false, true],
    'SmolLM2-135M': [30, 576, 9, 3, 64, 1536, 49152, 8192, true, false],
  }).map(([name, values]) => [name, Object.fromEntries(SIZES.map((size, i) => [size, values[i]]))]));
  const SLICES = { // devices that JAX sees, bytes of each one's memory
    'v2-8': [8, 8 * GIB], 'v5e-1': [1, 16 * GIB], 'v5e-4': [4, 16 * GIB], 'v5e-8': [8, 16 * GIB], 'v5p-8': [4, 95 * GIB], 'v6e-8': [8, 32 * GIB],
  };
  const TERMS = {
    weights: 'the frozen base, in bfloat16',
    adapter: 'the adapter and Adam’s two means, in float32',
    saved: 'what the layers keep for the backward pass',
    head: 'the output layer, gathered',
    logits: 'the loss: logits of a chunk of tokens, their gradient',
    gathered: 'that layer’s weights, gathered',
    layer: 'one layer on its way back: scores, MLP, gradients',
  };
  const div = (a, b) => Math.floor(a / b);

  // What utils.sharding.check, utils.lora.inject and utils.plan.compile_for refuse, in the order in which they are asked; null when all divides.
  function refusal(c, {batch, seq, rank, fsdp, tp}) {
    const sizes = [['heads', c.heads, 'tp', tp], ['mlp_width', c.mlp_width, 'tp', tp], ['vocab_size', c.vocab_size, 'tp', tp], ['width', c.width, 'fsdp', fsdp]];
    for (const [name, value, axis, count] of sizes) {
      if (value % count) return `${name}: ${value} does not divide over ${axis}=${count}`;
    }
    if (batch % fsdp) return `batch: ${batch} rows do not divide over fsdp=${fsdp}: choose a multiple of ${fsdp}`;
    if (seq > c.context) return `seq: expected at most ${c.context} (the model's context), found ${seq}`;
    const most = Math.min(c.width, c.kv_heads * c.head_size);
    if (rank > most) return `rank: expected at most ${most}, the narrowest layer's outputs, found ${rank}`;
    return null;
  }

  function estimate(c, {batch, seq, rank = 16, fsdp = 1, tp = 1, remat = true, chunk = CHUNK, chip = ''}) {
    const [D, F, q, kv] = [c.width, c.mlp_width, c.heads * c.head_size, c.kv_heads * c.head_size];
    const kvTp = c.kv_heads % tp ? 1 : tp;
    const column = [[q, D, tp], [kv, D, kvTp], [kv, D, kvTp], [F, D, tp], [F, D, tp]];
    const row = [[D, q, tp], [D, F, tp]];
    const sum = (values) => values.reduce((a, b) => a + b, 0);
    const matrices = sum([...column, ...row].map(([o, i, n]) => div(o * i, n * fsdp)));
    const biases = c.qkv_bias ? div(q, tp) + div(2 * kv, kvTp) : 0;
    const table = div(c.vocab_size * D, tp);
    const numbers = c.layers * (matrices + biases + 2 * D) + D + div((c.tied ? 1 : 2) * table, fsdp);
    const adapter = c.layers * rank * (sum(column.map(([o, i, n]) => div(o, n) + div(i, fsdp))) + sum(row.map(([o, i, n]) => div(o, fsdp) + div(i, n))));
    const rows = div(batch, fsdp);
    const tokens = rows * seq;
    const scores = rows * div(c.heads, tp) * seq * seq;
    const mlp = div(tokens * F, tp);
    const inChunk = rows * Math.max(1, div(Math.min(chunk, batch * seq), batch));
    const block = fsdp > 1 ? 2 * matrices * fsdp : 0;
    const kept = remat ? 2 * tokens * D : 6 * scores + 12 * mlp + 14 * tokens * D + 2 * tokens * (div(q, tp) + div(2 * kv, kvTp)) + block;
    const head = fsdp > 1 ? 2 * table : 0;
    const loss = Math.max(head, div(12 * inChunk * c.vocab_size, tp)) + 2 * adapter;
    const joined = rows === 1 || c.kv_heads <= tp || chip.startsWith('v6e');
    const layer = (joined ? 4 : 8) * scores + 14 * mlp + 32 * tokens * D + 6 * adapter;
    const found = {weights: 2 * numbers, adapter: 12 * adapter, saved: c.layers * kept};
    return {...found, ...(head + loss >= block + layer ? {head, logits: loss} : {gathered: block, layer})};
  }

  const total = (terms) => Object.values(terms).reduce((a, b) => a + b, 0);
  const gb = (bytes) => `${(bytes / 1e9).toFixed(bytes < 1e9 ? 3 : 2)} GB`;
  const whole = (value) => value.toLocaleString('en');

  Course.meshPlanner = {estimate, refusal, MODELS, SLICES};
  Course.widget('mesh-planner', (root, config) => {
    const state = {model: 'DeepSeek-R1-Distill-Qwen-1.5B', slice: 'v5e-8', tp: 1, batch: 16, seq: 2048, rank: 16, remat: true, ...config};
    const titleId = uid('planner-title');
    const CHOICES = {
      model: ['model', Object.keys(MODELS), String],
      slice: ['chips', Object.keys(SLICES), String],
      tp: ['fsdp × tp', [1, 2, 4, 8], Number],
      batch: ['batch, rows', [1, 2, 4, 8, 16, 32, 64, 128], Number],
      seq: ['tokens a row', [256, 512, 1024, 2048, 4096, 8192, 16384], Number],
      rank: ['rank', [1, 4, 8, 16, 32, 64, 128, 256], Number],
    };
    const controls = element('div', {class: 'planner-controls'});
    const inputs = {};
    for (const [name, [label, values, kind]] of Object.entries(CHOICES)) {
      const id = uid('planner');
      inputs[name] = element('select', {id, 'data-choice': name}, ...values.map((value) => element('option', {value, text: kind === Number ? whole(value) : value.replace('DeepSeek-', '')})));
      inputs[name].value = String(state[name]);
      inputs[name].addEventListener('change', () => { state[name] = kind(inputs[name].value); show(); });
      controls.append(element('label', {for: id, text: label}), inputs[name]);
    }
    const remat = element('input', {type: 'checkbox', 'data-choice': 'remat'});
    remat.checked = state.remat;
    remat.addEventListener('change', () => { state.remat = remat.checked; show(); });
    const verdict = element('p', {class: 'planner-verdict', 'aria-live': 'polite'});
    const bar = element('div', {class: 'planner-bar', role: 'img'});
    const table = element('table', {class: 'planner-terms'});
    root.setAttribute('role', 'group');
    root.setAttribute('aria-labelledby', titleId);
    root.append(element('p', {class: 'widget-title', id: titleId, text: 'What lies on each chip?'}),
      element('p', {class: 'widget-note', text: 'A LoRA step on all linear layers, by the formula of this page. The batch is that of all chips together; a core of a v2 counts as a chip.'}),
      controls, element('label', {class: 'planner-remat'}, remat, ' remat: keep only each layer’s input'), verdict, bar, table);

    function show() {
      const [devices, memory] = SLICES[state.slice];
      for (const option of inputs.tp.options) { // meshes of this slice
        const tp = Number(option.value);
        option.hidden = option.disabled = tp > devices;
        option.textContent = `${Math.max(1, div(devices, tp))} × ${tp}`;
      }
      if (state.tp > devices) { state.tp = devices; inputs.tp.value = String(devices); }
      const asked = {...state, chip: state.slice, fsdp: div(devices, state.tp)};
      const refused = refusal(MODELS[state.model], asked);
      root.dataset.refused = refused || '';
      bar.replaceChildren();
      table.replaceChildren();
      verdict.className = 'planner-verdict';
      if (refused) {
        verdict.classList.add('planner-no');
        verdict.textContent = `Refused. ${refused}.`;
        bar.setAttribute('aria-label', 'No plan');
        root.dataset.terms = '';
        return;
      }
      const terms = estimate(MODELS[state.model], asked);
      const all = total(terms);
      root.dataset.terms = JSON.stringify(terms);
      const fits = all <= memory;
      verdict.classList.add(fits ? 'planner-yes' : 'planner-no');
      const share = Math.round((100 * all) / memory);
      verdict.textContent = fits
        ? `Fits: ${gb(all)} of ${gb(memory)} on each chip (${share}%).${share > 85 ? ' Close: ask the compiler.' : ''}`
        : `Does not fit: ${gb(all)} of ${gb(memory)} on each chip (${share}%).${share < 140 ? ' So close, the compiler may still find a way: ask it.' : ''}`;
      const scale = Math.max(all, memory);
      const shown = Object.entries(terms).filter(([, bytes]) => bytes > 0);
      bar.setAttribute('aria-label', `${verdict.textContent} ${shown.map(([name, bytes]) => `${name} ${gb(bytes)}`).join(', ')}`);
      bar.append(...shown.map(([name, bytes]) => {
        const part = element('span', {class: `planner-part planner-${name}`, title: `${name}: ${gb(bytes)}`});
        part.style.width = `${(100 * bytes) / scale}%`;
        return part;
      }));
      const line = element('span', {class: 'planner-limit', title: `memory: ${gb(memory)}`});
      line.style.left = `${(100 * memory) / scale}%`;
      bar.append(line);
      table.append(element('tbody', {}, ...shown.map(([name, bytes]) => element('tr', {},
        element('th', {scope: 'row'}, element('span', {class: `planner-key planner-${name}`, 'aria-hidden': 'true'}), ` ${name}`),
        element('td', {class: 'planner-bytes', text: gb(bytes)}),
        element('td', {class: 'planner-what', text: TERMS[name]})))));
    }
    show();
  });
})();
