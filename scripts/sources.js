/**
 * The C++ sources of the addon, for binding.gyp and CMakeLists.txt alike: one sorted list, so that both build the same.
 *
 *   node scripts/sources.js <set>...     prints paths relative to the repository root
 *
 * Sets: `core` (everything below native/ but the rest), `addon` (the Node-API glue), and one per instruction set that needs
 * compiler flags of its own, `avx2` and `avx512` (x86-64), `dotprod` and `i8mm` (aarch64): the files of native/kernels/cpu
 * whose name starts so. CUDA sources (.cu) are a library of their own.
 */
'use strict';
const { readdirSync } = require('node:fs');
const path = require('node:path');

const root = path.dirname(__dirname);

function setOf(file) {
  if (file.startsWith('native/addon/')) return 'addon';
  return /^native\/kernels\/cpu\/(avx2|avx512|dotprod|i8mm)/.exec(file)?.[1] ?? 'core';
}

function sources(sets) {
  return readdirSync(path.join(root, 'native'), { recursive: true })
    .map((file) => `native/${file.split(path.sep).join('/')}`)
    .filter((file) => file.endsWith('.cpp') && sets.includes(setOf(file)))
    .sort();
}

module.exports = { sources };
if (require.main === module) console.log(sources(process.argv.slice(2)).join('\n'));
