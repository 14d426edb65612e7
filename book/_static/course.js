// Brings `<div class="widget" data-widget="NAME" data-config='{…}'>fallback</div>` to life.
//
// The script of a widget is fetched only by pages that hold it. It calls Course.widget("NAME", build); build(element, config)
// receives the emptied div. Where scripts do not run (Colab, GitHub, print) the fallback inside the div is what people see.
(() => {
  'use strict';
  const base = new URL('widgets/', document.currentScript.src);
  const loads = new Map();
  const builders = new Map();
  const stores = new Map();

  // One <script> per file, also from file:// (where fetch is refused).
  function load(name) {
    if (!loads.has(name)) {
      loads.set(name, new Promise((resolve, reject) => {
        const script = document.createElement('script');
        script.src = new URL(`${name}.js`, base);
        script.onload = () => resolve();
        script.onerror = () => reject(new Error(`widgets/${name}.js did not load`));
        document.head.append(script);
      }));
    }
    return loads.get(name);
  }

  // element('p', {class: 'x', text: 'y'}, child, …): a DOM node; never markup from strings.
  function element(tag, attributes = {}, ...children) {
    const svg = ['svg', 'g', 'path', 'line', 'text', 'circle', 'rect', 'title', 'polyline', 'tspan'].includes(tag);
    const node = svg ? document.createElementNS('http://www.w3.org/2000/svg', tag) : document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) {
      if (key === 'text') node.textContent = value;
      else if (key.startsWith('on')) node.addEventListener(key.slice(2), value);
      else if (value !== null && value !== undefined && value !== false) node.setAttribute(key, value);
    }
    node.append(...children);
    return node;
  }

  let ids = 0;
  window.Course = {
    widget(name, build) { builders.set(name, build); },
    data(name, value) { stores.set(name, value); },
    async fetchData(name) { await load(name); return stores.get(name); },
    uid(prefix) { ids += 1; return `${prefix}-${ids}`; },
    element,
  };

  async function bringToLife(div) {
    const name = div.dataset.widget;
    if (!/^[a-z0-9_-]+$/.test(name)) return;
    try {
      await load(name);
      const config = div.dataset.config ? JSON.parse(div.dataset.config) : {};
      const fallback = [...div.childNodes];
      div.replaceChildren();
      div.classList.add('widget-live', `widget-${name}`);
      try {
        await builders.get(name)(div, config);
        div.dataset.state = 'ready';
      } catch (error) {
        div.replaceChildren(...fallback);
        throw error;
      }
    } catch (error) {
      div.dataset.state = 'failed';
      console.error(`widget ${name}: ${error.message}`);
    }
  }
  document.querySelectorAll('div.widget[data-widget]').forEach(bringToLife);

  // Tell keyboard users which boxes scroll: only those that do are in the tab order.
  function tabOrder() {
    document.querySelectorAll('.bd-article pre, .table-box, .math-display').forEach((box) => {
      const scrolls = box.scrollWidth > box.clientWidth + 1 || box.scrollHeight > box.clientHeight + 1;
      if (scrolls) box.setAttribute('tabindex', '0');
      else box.removeAttribute('tabindex');
    });
  }
  window.addEventListener('load', tabOrder);
  window.addEventListener('resize', tabOrder);
  document.addEventListener('toggle', tabOrder, true);
})();
