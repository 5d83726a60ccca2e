// What every consumer checks: the public names are there, and the addon computes.
const assert = require('node:assert/strict');
const path = require('node:path');

module.exports = async function use(api, kernels) {
  for (const name of ['MoeModel', 'quantizeMoE', 'pruneExperts', 'evaluate', 'EacMoeError']) {
    assert.equal(typeof api[name], 'function', `eac-moe does not export ${name}`);
  }
  assert(Object.keys(kernels).length > 0, 'eac-moe/kernels exports nothing');

  // Below the public API, so that this holds whatever that becomes.
  const installed = path.dirname(require.resolve('eac-moe/package.json'));
  const { native } = require(path.join(installed, 'dist', 'native.js'));
  const { fromArray, linear, info } = native();
  assert.equal(info().version, require('eac-moe/package.json').version);
  const x = fromArray(Float32Array.of(1, 2), 'f32', [1, 2]);
  const w = fromArray(Float32Array.of(3, 4, 5, 6), 'f32', [2, 2]);
  assert.deepEqual([...(await linear(x, w, undefined, 'float32')).toArray()], [11, 17]);
  assert.throws(
    () => x.reshape([3]),
    (error) => error instanceof api.EacMoeError && error.code === 'INVALID_ARGUMENT',
  );

  // The hub's client is there and loads; offline it asks nobody.
  process.env.HF_HUB_OFFLINE = '1';
  process.env.HF_HOME = path.join(installed, 'no-such-cache');
  await assert.rejects(api.MoeModel.load('hf:eac-moe/none'), { code: 'HUB_UNAVAILABLE' });
};
