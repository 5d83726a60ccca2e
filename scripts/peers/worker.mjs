/**
 * One side of the comparison, in a process of its own: `node worker.mjs ours|peer`, driven over the IPC channel by side.ts.
 * Plain JavaScript against dist/, so that no compiler counts towards the memory.
 */
import { readFileSync } from 'node:fs';
import { createRequire, register } from 'node:module';
import { performance } from 'node:perf_hooks';

/** The library through its built files: one call of `decoder.step` a prefill or token, as `MoeModel.generate` does. */
class Ours {
  #models = [];

  async start({ threads, activations, headBits, isa: level }) {
    const require = createRequire(import.meta.url);
    this.model = require('../../dist/model/model.js').MoeModel;
    const kernels = require('../../dist/kernels.js');
    kernels.setThreads(threads);
    if (level) kernels.setIsa(level);
    this.options = { threads, activations, headBits };
    const { version, isa } = kernels.cpuInfo();
    return { name: `eac-moe ${version}`, cpu: isa };
  }

  async load({ path }) {
    this.#models.push({ model: await this.model.load(path, this.options) });
  }

  async prefill(index, ids) {
    const state = this.#models[index];
    state.cache?.dispose();
    state.cache = state.model.createCache();
    return this.#step(state, ids);
  }

  async decode(index, ids) {
    const times = [];
    for (const id of ids) times.push(await this.#step(this.#models[index], [id]));
    return times;
  }

  async finite(index, ids) {
    const { logits } = await this.#models[index].model.forward(ids, { logits: 'last' });
    return logits.every(Number.isFinite);
  }

  async #step({ model, cache }, ids) {
    const sampling = { temperature: 0, topK: 0, topP: 1, uniform: Float64Array.of(0) };
    const batch = { ids: Int32Array.from(ids), sequences: [{ length: ids.length, cache }] };
    const begin = performance.now();
    await model.decoder.step(batch, sampling, { activations: model.activations });
    return performance.now() - begin;
  }

  unload() {
    for (const { model, cache } of this.#models.splice(0)) {
      cache?.dispose();
      model.dispose();
    }
  }
}

/**
 * node-llama-cpp: `LlamaContextSequence.evaluate` with greedy sampling. A step's time includes its queue (one turn of the event loop),
 * llama_decode, and sampling in native code.
 */
class Peer {
  #models = [];

  async start({ threads, binaries }) {
    if (binaries) replaceBinaries(binaries);
    const { getLlama, LlamaLogLevel } = await import('node-llama-cpp');
    this.threads = threads;
    this.llama = await getLlama({
      gpu: false,
      build: 'never',
      skipDownload: true,
      progressLogs: false,
      maxThreads: threads,
      logLevel: LlamaLogLevel.error,
    });
    const { llamaCppRelease } = this.llama;
    return {
      name: `llama.cpp ${llamaCppRelease.release} in node-llama-cpp ${packageVersion()}`,
      cpu: `${loadedVariant()}${this.llama.systemInfo.trim()}`,
    };
  }

  async load({ path, mmap, batch = 512, contextSize = 1024 }) {
    const model = await this.llama.loadModel({ modelPath: path, useMmap: mmap, gpuLayers: 0 });
    // node-llama-cpp sets n_ubatch to batchSize: a prefill of `batch` tokens is one pass over the weights.
    const context = await model.createContext({
      sequences: 1,
      contextSize,
      batchSize: batch,
      threads: this.threads,
      ignoreMemorySafetyChecks: true,
    });
    this.#models.push({ model, context, sequence: context.getSequence() });
  }

  async prefill(index, ids) {
    const state = this.#models[index];
    await state.tokens?.return();
    await state.sequence.clearHistory();
    state.tokens = state.sequence.evaluate(ids, { temperature: 0, yieldEogToken: true });
    return this.#next(state);
  }

  async decode(index, ids) {
    const times = [];
    for (const id of ids) times.push(await this.#next(this.#models[index], id));
    return times;
  }

  async finite(index, ids) {
    const { sequence } = this.#models[index];
    await sequence.clearHistory();
    const options = { temperature: 1, yieldEogToken: true };
    const steps = sequence.evaluateWithMetadata(ids, { probabilities: true }, options);
    const { value } = await steps.next();
    await steps.return();
    const total = [...value.probabilities.values()].reduce((a, b) => a + b, 0);
    return Math.abs(total - 1) < 1e-3;
  }

  /** Raw logits of the next token at each position, [tokens, vocabulary]. */
  async #logits(index, ids) {
    const { sequence } = this.#models[index];
    await sequence.clearHistory();
    const next = { generateNext: { logits: true, options: { temperature: 1, topK: 0, topP: 1, minP: 0 } } };
    const rows = await sequence.controlledEvaluate(ids.map((id) => [id, next]));
    return rows.map(({ next: { logits } }) => {
      const row = new Float32Array(logits.size);
      for (const [id, logit] of logits) row[id] = logit;
      return row;
    });
  }

  async logits(index, ids) {
    return (await this.#logits(index, ids)).map((row) => [...row]);
  }

  /** Nats of each id after the ones before it, from the second on. */
  async nll(index, ids) {
    const rows = await this.#logits(index, ids);
    return ids.slice(1).map((id, i) => {
      const top = rows[i].reduce((a, b) => Math.max(a, b));
      return top + Math.log(rows[i].reduce((sum, x) => sum + Math.exp(x - top), 0)) - rows[i][id];
    });
  }

  /** Token ids of a text, as the file's own tokenizer has them. */
  tokenize(index, text) {
    return [...this.#models[index].model.tokenize(text)];
  }

  /** `id` takes the place of the token that was sampled. */
  async #next({ tokens }, id) {
    const begin = performance.now();
    const { done } = await tokens.next(id);
    if (done) throw new Error('node-llama-cpp stopped generating');
    return performance.now() - begin;
  }

  async unload() {
    for (const { model, tokens } of this.#models.splice(0)) {
      await tokens?.return();
      await model.dispose();
    }
  }
}

function packageVersion() {
  const url = new URL('../package.json', import.meta.resolve('node-llama-cpp'));
  return JSON.parse(readFileSync(url, 'utf8')).version;
}

/** node-llama-cpp asks the platform's package where its binaries are: this one answers in its place. */
function replaceBinaries(folder) {
  const answer = { binsDir: folder, packageVersion: packageVersion() };
  const url = moduleUrl(`export const getBinsDir = () => (${JSON.stringify(answer)});`);
  const name = `@node-llama-cpp/${process.platform}-${process.arch}`;
  register(
    moduleUrl(`export const resolve = (specifier, context, next) =>
      specifier === '${name}' ? { url: ${JSON.stringify(url)}, shortCircuit: true } : next(specifier, context);`),
  );
}

const moduleUrl = (source) => `data:text/javascript,${encodeURIComponent(source)}`;

/** Which of its CPU variants ggml chose, e.g. 'haswell: '; only Linux tells. */
function loadedVariant() {
  if (process.platform !== 'linux') return '';
  const variant = /libggml-cpu-(\w+)\.so/.exec(readFileSync('/proc/self/maps', 'utf8'));
  return variant ? `${variant[1]}: ` : '';
}

/** Bytes. Linux counts ru_maxrss from before exec, so its own high-water mark is better there. */
function peakMemory() {
  if (process.platform !== 'linux') return process.resourceUsage().maxRSS * 1024;
  return 1024 * Number(/VmHWM:\s*(\d+)/.exec(readFileSync('/proc/self/status', 'utf8'))[1]);
}

const side = process.argv[2] === 'peer' ? new Peer() : new Ours();
process.on('message', async ({ call, args }) => {
  try {
    const result = call === 'peakMemory' ? peakMemory() : await side[call](...args);
    process.send({ result });
  } catch (error) {
    process.send({ error: { code: error.code ?? error.constructor.name, message: error.message } });
  }
});
