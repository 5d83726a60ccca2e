import assert from 'node:assert/strict';
import { createRequire } from 'node:module';
import * as api from 'eac-moe';
import * as kernels from 'eac-moe/kernels';
import { EacMoeError } from 'eac-moe';
import use from './use.cjs';

const require = createRequire(import.meta.url);
assert.deepEqual(Object.keys(api).sort(), Object.keys(require('eac-moe')).sort());
assert.deepEqual(Object.keys(kernels).sort(), Object.keys(require('eac-moe/kernels')).sort());
assert.equal(EacMoeError, require('eac-moe').EacMoeError);
await use(api, kernels);
