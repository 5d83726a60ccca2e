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
  assert.equal(await api.findNonFinite(out), 0);
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
      const packed = q.toGptq();
      const back = api.fromGptq(packed, { rows: 24, cols: 96, bits, groupSize: 32, symmetric: false });
      assert.deepEqual(back.codes().toArray(), q.codes().toArray());
      const y = await api.linear(x, q);
      assert.equal(y.toArray().length, 200 * 24);
    }
    rtn.dispose();
  }
  await assert.rejects(
    async () => api.quantizeRtn(w, { bits: 5, groupSize: 32, symmetric: false, clipSearch: false }),
    { code: 'INVALID_ARGUMENT' },
  );
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
  for (const walk of [tensors, files, quantization, aborts, workers]) {
    await walk();
    globalThis.gc?.();
    console.log(`${walk.name}: ok`);
  }
}

(isMainThread ? main() : inWorker()).catch((error) => {
  console.error(error);
  process.exitCode = 1;
});
