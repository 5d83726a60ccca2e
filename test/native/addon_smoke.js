/**
 * A walk through the addon for the sanitizers: every handle class is made, used, misused and disposed of or left to the
 * collector; jobs are aborted; workers end while jobs run. Plain script: jest's own memory habits would drown ours.
 */
'use strict';
const assert = require('node:assert/strict');
const fs = require('node:fs');
const os = require('node:os');
const path = require('node:path');
const { Worker, isMainThread } = require('node:worker_threads');
const { native, withSignal } = require('../../dist/native.js');

const api = native();

function random(rows, cols) {
  let state = 1;
  const data = Float32Array.from({ length: rows * cols }, () => {
    state = (state * 48271) % 2147483647;
    return state / 2147483647 - 0.5;
  });
  return api.fromArray(data, 'f32', [rows, cols]);
}

async function tensors() {
  const x = random(8, 96);
  const y = await api.cast(x, 'bf16');
  assert.equal(y.byteLength, 8 * 96 * 2);
  const part = x.rows(2, 4);
  x.dispose();
  assert.equal(part.toArray().length, 2 * 96);
  assert.throws(() => x.toArray(), { code: 'DISPOSED' });
  assert.throws(() => part.rows(1, 5), { code: 'INVALID_ARGUMENT' });
  assert.throws(() => part.reshape([7]), { code: 'INVALID_ARGUMENT' });
  const out = api.zeros('f32', [2, 96]);
  await api.gatherRows(part, Int32Array.of(1, 0), out);
  assert.deepEqual(out.rows(1, 2).toArray(), part.rows(0, 1).toArray());
  await assert.rejects(async () => api.gatherRows(part, Int32Array.of(2, 0), out), {
    code: 'INVALID_ARGUMENT',
  });
  out.write(new Float32Array(2 * 96).fill(NaN));
  assert.equal((await api.scanTensor(out)).nonFinite, 0);
}

async function files() {
  const directory = fs.mkdtempSync(path.join(os.tmpdir(), 'eac-moe-'));
  try {
    const file = path.join(directory, 'numbers');
    fs.writeFileSync(file, new Uint8Array(Float32Array.of(1, 2, 3, 4).buffer));
    const mapped = api.mapFile(file);
    const tensor = mapped.tensor('f32', [2, 2], 0);
    assert.throws(() => mapped.tensor('f32', [3, 2], 0), { name: 'EacMoeError' });
    mapped.dispose();
    assert.deepEqual([...tensor.toArray()], [1, 2, 3, 4]);
    assert.throws(() => api.mapFile(path.join(directory, 'none')), { code: 'FILE_NOT_FOUND' });
  } finally {
    fs.rmSync(directory, { recursive: true });
  }
}

async function quantization() {
  const w = random(24, 96);
  const x = random(200, 96);
  const h = api.zeros('f32', [96, 96]);
  await api.accumulateHessian(h, x);
  const factor = await api.factorHessian(h, 0.01, true);
  for (const bits of [2, 3, 4]) {
    const options = { bits, groupSize: 32, symmetric: false, clipSearch: bits === 2 };
    const rtn = await api.quantizeRtn(w, options, factor.diagonal());
    const { matrix } = await api.quantizeGptq(w, factor, options);
    for (const q of [rtn, matrix]) {
      const packed = await q.toGptq();
      const back = await api.fromGptq(packed, { rows: 24, cols: 96, bits, groupSize: 32, symmetric: false });
      assert.deepEqual((await back.codes()).toArray(), (await q.codes()).toArray());
      for (const activations of ['float32', 'int8']) {
        const y = await api.linear(x, q, undefined, activations);
        assert.equal(y.toArray().length, 200 * 24);
      }
    }
    rtn.dispose();
  }
  await assert.rejects(
    async () => api.quantizeRtn(w, { bits: 5, groupSize: 32, symmetric: false, clipSearch: false }),
    { code: 'INVALID_ARGUMENT' },
  );
}

/** Weights as published: parts of fused tensors, FP8, MXFP4. */
async function published() {
  const m = random(6, 10);
  const part = { from: 1, step: 3, rows: 3, transposed: true };
  assert.equal((await api.copyPart(m, part)).toArray()[7], m.toArray()[1 * 10 + 4]);
  await assert.rejects(async () => api.copyPart(m, { ...part, rows: 4 }), { code: 'INVALID_ARGUMENT' });
  const codes = api.fromBytes(new Uint8Array(130 * 7).fill(0x38), 'u8', [130, 7]);
  const scales = api.fromArray(Float32Array.of(2, 4), 'f32', [2, 1]);
  assert.equal((await api.decodeFp8(codes, scales, [128, 128])).toArray()[909], 4);
  codes.rows(129, 130).write(new Uint8Array(7).fill(0xff));
  await assert.rejects(api.decodeFp8(codes, scales, [128, 128]), { code: 'NON_FINITE' });
  const blocks = api.fromBytes(new Uint8Array(5 * 32).fill(0x72), 'u8', [5, 32]);
  const exponents = api.fromBytes(new Uint8Array(10).fill(128), 'u8', [5, 2]);
  const rows = await api.decodeMxfp4(blocks, exponents, { from: 0, step: 2, rows: 3 });
  assert.deepEqual([...rows.toArray().subarray(190)], [2, 12]);
}

/** One MoE layer with a KV cache: a prefill of two sequences, then a step, with and without an expert mask. */
async function program() {
  const [vocab, width, experts, topK] = [40, 64, 4, 2];
  const router = { scoring: 'softmax', topK, renormalize: true, scale: 1, jitter: 0 };
  const attention = { layer: 0, heads: 2, kvHeads: 2, headDim: 32, scale: 0.17, window: 0 };
  const frequencies = api.fromArray(
    Float32Array.from({ length: 16 }, (_, i) => 100 ** (-i / 16)),
    'f32',
    [16],
  );
  const rope = { headDim: 32, frequencies, scale: 1, interleaved: false };
  const norm = api.fromArray(new Float32Array(width).fill(1), 'f32', [width]);
  const many = (rows, cols) => Array.from({ length: experts }, () => random(rows, cols));
  const tokens = (w, dtype = 'f32') => ({ width: w, dtype, rows: 'tokens' });
  const sequences = (w, dtype = 'f32') => ({ width: w, dtype, rows: 'sequences' });
  const registers = [
    ...[
      tokens(width),
      tokens(width),
      tokens(width),
      tokens(width),
      tokens(width),
      tokens(width),
      tokens(experts),
    ],
    ...[tokens(topK), tokens(topK, 'i32'), sequences(experts, 'i32'), sequences(width), sequences(vocab)],
    sequences(1, 'i32'),
  ];
  const ops = [
    { op: 'embed', out: 0, table: random(vocab, width), scale: 1 },
    { op: 'rmsNorm', x: 0, out: 1, weight: norm, eps: 1e-6 },
    ...[2, 3, 4].map((out) => ({ op: 'linear', x: 1, out, weight: random(width, width) })),
    ...[2, 3].map((x) => ({ op: 'rope', x, ...rope })),
    { op: 'attention', q: 2, k: 3, v: 4, out: 5, ...attention },
    { op: 'linear', x: 5, out: 0, weight: random(width, width), add: true },
    { op: 'rmsNorm', x: 0, out: 1, weight: norm, eps: 1e-6 },
    { op: 'linear', x: 1, out: 6, weight: random(experts, width) },
    { op: 'route', logits: 6, weights: 7, indices: 8, counts: 9, router },
    { op: 'reselect', logits: 6, weights: 7, indices: 8, counts: 9, router },
    ...[{ gate: many(32, width), up: many(32, width), down: many(width, 32) }].map((w) => ({
      ...{ op: 'experts', x: 1, weights: 7, indices: 8, out: 0, activation: 'silu', add: true, ...w },
    })),
    { op: 'lastRows', x: 0, out: 10 },
    { op: 'linear', x: 10, out: 11, weight: random(vocab, width) },
    { op: 'sample', logits: 11, out: 12 },
  ];
  const compiled = api.createProgram(registers, ops);
  const frame = api.createFrame(compiled);
  compiled.dispose();
  const caches = [0, 1].map(() => api.createKvCache([{ keyWidth: width, valueWidth: width }]));
  for (const lengths of [
    [5, 3],
    [1, 1],
  ]) {
    const batch = lengths.map((length, i) => ({ length, cache: caches[i] }));
    frame.begin(new Int32Array(lengths[0] + lengths[1]).fill(7), batch);
    frame.setSampling({ temperature: 0.5, topK: 5, topP: 0.9, uniform: Float64Array.of(0.2, 0.9) });
    for (const mode of ['drop', 'renormalize', 'reselect']) {
      for (const by of [{ mask: Uint8Array.of(1, 1, 0, 1, 1, 1, 1, 1) }, { alpha: 0.9, minTokens: 1 }]) {
        frame.setPruning({ ...by, mode });
        await frame.run(0, ops.length);
      }
    }
    assert.equal(frame.read(12).length, 2);
    frame.commit();
  }
  assert.deepEqual(
    caches.map((cache) => cache.length),
    [6, 4],
  );
  frame.setPruning(null);
  const unknownToken = async () => {
    frame.begin(Int32Array.of(vocab), [{ length: 1 }]);
    await frame.run(0, 1);
  };
  await assert.rejects(unknownToken, { code: 'INVALID_ARGUMENT' });
  assert.throws(() => frame.read(99), { code: 'INVALID_ARGUMENT' });
  caches[0].truncate(2);
  for (const handle of [...caches, frame]) handle.dispose();
  assert.throws(() => frame.read(12), { code: 'DISPOSED' });
}

async function aborts() {
  const controller = new AbortController();
  const h = api.zeros('f32', [768, 768]);
  await api.accumulateHessian(h, random(768, 768));
  const job = withSignal(controller.signal, (control) => api.factorHessian(h, 0.01, false, control));
  controller.abort();
  await assert.rejects(job, { code: 'ABORTED' });
}

/** A worker ends by itself, with a job running, and by terminate(). */
async function workers() {
  for (const terminate of [false, true]) {
    const worker = new Worker(__filename);
    await new Promise((resolve, reject) => worker.once('message', resolve).once('error', reject));
    if (terminate) await worker.terminate();
    else await new Promise((resolve) => worker.once('exit', resolve));
  }
}

async function inWorker() {
  const h = api.zeros('f32', [256, 256]);
  await api.accumulateHessian(h, random(256, 256));
  const { parentPort } = require('node:worker_threads');
  parentPort.postMessage('running');
  void api.factorHessian(h, 0.01, false).then(() => api.factorHessian(h, 0.01, true));
}

async function main() {
  for (const isa of api.info().isas) {
    api.setIsa(isa);
    for (const walk of [tensors, files, quantization, published, program, aborts, workers]) {
      await walk();
      globalThis.gc?.();
      console.log(`${isa} ${walk.name}: ok`);
    }
  }
}

(isMainThread ? main() : inWorker()).catch((error) => {
  console.error(error);
  process.exitCode = 1;
});
