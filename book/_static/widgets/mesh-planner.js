// Mesh planner: model, chips, mesh, batch, length, rank, gradient checkpointing -> bytes on each chip by term, and whether
// they fit.
//
// config: {model?, slice?, tp?, batch_size?, seq_len?, rank?, gradient_checkpointing?}. The formula is
// utils.commands.plan.estimate (chapter 13 derives it), the refusals are those of utils.sharding.check; tests hold both, and
// the sizes below, to the package and to the recorded plans.
(() => {
  'use strict';
  const {element, uid} = Course;
  const GIB = 2 ** 30;
  const LOSS_CHUNK_SIZE = 1024;
  const SIZES = ['num_hidden_layers', 'hidden_size', 'num_attention_heads', 'num_key_value_heads', 'head_dim',
    'intermediate_size', 'vocab_size', 'max_position_embeddings', 'tie_word_embeddings', 'attention_bias'];
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
    head: 'the output layer, all-gathered',
    logits: 'the loss: logits of a chunk of tokens, their gradient',
    gathered: 'that layer’s weights, all-gathered',
    layer: 'one layer on its way back: scores, MLP, gradients',
  };
  const div = (a, b) => Math.floor(a / b);

  // What utils.sharding.check, utils.lora.inject and utils.commands.plan.compile_for refuse, in their order; null when all
  // divides.
  function refusal(c, {batch_size, seq_len, rank, fsdp, tp}) {
    for (const [name, axis, count] of [['num_attention_heads', 'tp', tp], ['intermediate_size', 'tp', tp],
      ['vocab_size', 'tp', tp], ['hidden_size', 'fsdp', fsdp]]) {
      if (c[name] % count) return `${name}: ${c[name]} does not divide over ${axis}=${count}`;
    }
    if (batch_size % fsdp) return `batch_size: ${batch_size} rows do not divide over fsdp=${fsdp}: choose a multiple of ${fsdp}`;
    const longest = c.max_position_embeddings;
    if (seq_len > longest) return `seq_len: expected at most ${longest}, the model's max_position_embeddings, found ${seq_len}`;
    const most = Math.min(c.hidden_size, c.num_key_value_heads * c.head_dim);
    if (rank > most) return `rank: expected at most ${most}, the narrowest layer's outputs, found ${rank}`;
    return null;
  }

  function estimate(c, {batch_size, seq_len, rank = 16, fsdp = 1, tp = 1, gradient_checkpointing = true,
    loss_chunk_size = LOSS_CHUNK_SIZE, chip = ''}) {
    const [D, F, L, V] = [c.hidden_size, c.intermediate_size, c.num_hidden_layers, c.vocab_size];
    const [heads, kvHeads] = [c.num_attention_heads, c.num_key_value_heads];
    const [q, kv] = [heads * c.head_dim, kvHeads * c.head_dim];
    const kvTp = kvHeads % tp ? 1 : tp;
    const column = [[q, D, tp], [kv, D, kvTp], [kv, D, kvTp], [F, D, tp], [F, D, tp]];
    const row = [[D, q, tp], [D, F, tp]];
    const sum = (values) => values.reduce((a, b) => a + b, 0);
    const matrices = sum([...column, ...row].map(([o, i, n]) => div(o * i, n * fsdp)));
    const biases = c.attention_bias ? div(q, tp) + div(2 * kv, kvTp) : 0;
    const table = div(V * D, tp);
    const parameters = L * (matrices + biases + 2 * D) + D + div((c.tie_word_embeddings ? 1 : 2) * table, fsdp);
    const adapter = L * rank * (sum(column.map(([o, i, n]) => div(o, n) + div(i, fsdp)))
      + sum(row.map(([o, i, n]) => div(o, fsdp) + div(i, n))));
    const rows = div(batch_size, fsdp);
    const tokens = rows * seq_len;
    const scores = rows * div(heads, tp) * seq_len * seq_len;
    const mlp = div(tokens * F, tp);
    const inChunk = rows * Math.max(1, div(Math.min(loss_chunk_size, batch_size * seq_len), batch_size));
    const block = fsdp > 1 ? 2 * matrices * fsdp : 0;
    const kept = gradient_checkpointing ? 2 * tokens * D
      : 6 * scores + 12 * mlp + 14 * tokens * D + 2 * tokens * (div(q, tp) + div(2 * kv, kvTp)) + block;
    const head = fsdp > 1 ? 2 * table : 0;
    const loss = Math.max(head, div(12 * inChunk * V, tp)) + 2 * adapter;
    const fused = rows === 1 || kvHeads <= tp || chip.startsWith('v6e');
    const layer = (fused ? 4 : 8) * scores + 14 * mlp + 32 * tokens * D + 6 * adapter;
    const always = {weights: 2 * parameters, adapter: 12 * adapter, saved: L * kept};
    return {...always, ...(head + loss >= block + layer ? {head, logits: loss} : {gathered: block, layer})};
  }

  const total = (terms) => Object.values(terms).reduce((a, b) => a + b, 0);
  const gb = (bytes) => `${(bytes / 1e9).toFixed(bytes < 1e9 ? 3 : 2)} GB`;
  const whole = (value) => value.toLocaleString('en');

  Course.meshPlanner = {estimate, refusal, MODELS, SLICES};
  Course.widget('mesh-planner', (root, config) => {
    const state = {model: 'DeepSeek-R1-Distill-Qwen-1.5B', slice: 'v5e-8', tp: 1, batch_size: 16, seq_len: 2048, rank: 16,
      gradient_checkpointing: true, ...config};
    const titleId = uid('planner-title');
    const CHOICES = {
      model: ['model', Object.keys(MODELS), String],
      slice: ['chips', Object.keys(SLICES), String],
      tp: ['fsdp × tp', [1, 2, 4, 8], Number],
      batch_size: ['batch, rows', [1, 2, 4, 8, 16, 32, 64, 128], Number],
      seq_len: ['tokens a row', [256, 512, 1024, 2048, 4096, 8192, 16384], Number],
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
    const checkpointing = element('input', {type: 'checkbox', 'data-choice': 'gradient_checkpointing'});
    checkpointing.checked = state.gradient_checkpointing;
    checkpointing.addEventListener('change', () => { state.gradient_checkpointing = checkpointing.checked; show(); });
    const verdict = element('p', {class: 'planner-verdict', 'aria-live': 'polite'});
    const bar = element('div', {class: 'planner-bar', role: 'img'});
    const table = element('table', {class: 'planner-terms'});
    root.setAttribute('role', 'group');
    root.setAttribute('aria-labelledby', titleId);
    root.append(element('p', {class: 'widget-title', id: titleId, text: 'What lies on each chip?'}),
      element('p', {class: 'widget-note', text: 'A LoRA step on all linear layers, by the formula of this page. The batch is that of all chips together; a core of a v2 counts as a chip.'}),
      controls, element('label', {class: 'planner-checkpointing'}, checkpointing,
        ' gradient checkpointing: keep only each layer’s input'), verdict, bar, table);

    function show() {
      const [devices, memory] = SLICES[state.slice];
      for (const option of inputs.tp.options) { // meshes of this slice
        const tp = Number(option.value);
        option.hidden = option.disabled = tp > devices;
        option.textContent = `${Math.max(1, div(devices, tp))} × ${tp}`;
      }
      if (state.tp > devices) { state.tp = devices; inputs.tp.value = String(devices); }
      const setting = {...state, chip: state.slice, fsdp: div(devices, state.tp)};
      const refused = refusal(MODELS[state.model], setting);
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
      const terms = estimate(MODELS[state.model], setting);
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
