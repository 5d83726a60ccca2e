/** The GPTQ export through PyTorch and transformers (scripts/export/gptq_torch.py). Set EAC_MOE_PYTHON to a Python that has them. */
import { join } from 'node:path';
import { exportCheckpoint } from '../../lib/export';
import { MoeModel } from '../../lib/model/model';
import { pythonWithTorch, torchNll } from '../../scripts/export/torch';
import { scratch } from '../checkpoint/helpers';
import { relativeError } from '../quantize/helpers';
import { rounded } from './helpers';

const python = pythonWithTorch();
if (!python) console.warn('SKIPPED: no Python with torch and transformers; set EAC_MOE_PYTHON');
const withTorch = python ? test : test.skip;
const dir = scratch();

withTorch.each([
  { bits: 3, gptqVersion: 2, symmetric: false },
  { bits: 4, gptqVersion: 1, symmetric: true },
] as const)(
  '$bits bit, version $gptqVersion: transformers computes our logits',
  async ({ bits, gptqVersion, symmetric }) => {
    const source = await rounded(dir, `${bits}`, { bits, symmetric, groupSize: 64 });
    const output = join(dir, `${bits}-gptq`);
    await exportCheckpoint(source, { format: 'gptq', output, gptqVersion });
    const ids = Array.from({ length: 64 }, (_, i) => (i * 61) % 4096);
    const { logits } = await torchNll(python!, output, [ids]);
    const model = await MoeModel.load(source, { activations: 'float32' });
    const ours = (await model.forward(ids, { logits: 'last' })).logits;
    model.dispose();
    expect(relativeError(logits, ours)).toBeLessThan(1e-4);
  },
  60_000,
);
