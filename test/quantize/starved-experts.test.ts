/**
 * Experts that few calibration tokens reach, or none: they are calibrated with the tokens that the router likes next best for them, up to
 * `minExpertTokens`; where even these say nothing, they are rounded to nearest. Either way they are quantized, and reported.
 */
import { join } from 'node:path';
import { readMatrix } from '../../lib/checkpoint/quantized';
import { Checkpoint } from '../../lib/checkpoint/source';
import { MoeModel } from '../../lib/model/model';
import { native } from '../../lib/native';
import { quantizeMoE } from '../../lib/quantize';
import type { QuantizeOptions, QuantizeReport } from '../../lib/quantize/options';
import type { QuantMatrix } from '../../types/native';
import { scratch } from '../checkpoint/helpers';
import { bf16, TINY_CONFIG, writeSynthetic } from '../synthetic';
import { FEW, logitsOf, randomIds, relativeError } from './helpers';

const dir = scratch();
const STARVED = 5;
const TOKENS = FEW.samples * FEW.seqLen;
const calibration = randomIds(TINY_CONFIG.vocab_size);
const hidden = TINY_CONFIG.hidden_size;
let count = 0;

/** A model whose tokens all have a large first channel, at which every router takes `dislike` from the logit of one expert. */
async function withStarvedExpert(dislike: number): Promise<string> {
  const source = join(dir, `source-${count++}`);
  await writeSynthetic(source, TINY_CONFIG, {
    edit: ({ role }, values) => {
      if (role === 'embedding') for (let i = 0; i < values.length; i += hidden) values[i] = bf16(4);
      if (role === 'router') {
        values.fill(0, STARVED * hidden, (STARVED + 1) * hidden);
        // The norm makes the first channel about sqrt(hidden).
        values[STARVED * hidden] = bf16(-dislike / Math.sqrt(hidden));
      }
    },
  });
  return source;
}

interface Outcome {
  report: QuantizeReport;
  /** Error of the starved expert's weights in layer 0, relative to their spread, and that of plain rounding. */
  errors: { projection: string; found: number; rounded: number }[];
  equalsRounding: boolean;
}

async function quantize(source: string, options: Partial<QuantizeOptions> = {}): Promise<Outcome> {
  const output = join(dir, `output-${count++}`);
  const { model, report } = await quantizeMoE(source, {
    ...FEW,
    calibration,
    groupSize: 32,
    ...options,
    output,
  });
  const probe = randomIds(TINY_CONFIG.vocab_size, 1, 50)[0]!;
  expect((await logitsOf(model, probe)).every(Number.isFinite)).toBe(true);
  model.dispose();
  const [before, after] = [Checkpoint.open(source), Checkpoint.open(output)];
  const outcome: Outcome = { report, errors: [], equalsRounding: true };
  for (const projection of ['gate_proj', 'up_proj', 'down_proj']) {
    const name = `model.layers.0.mlp.experts.${STARVED}.${projection}.weight`;
    const w = before.tensor(name);
    const [out, inputs] = w.shape as [number, number];
    const matrix = (await readMatrix(after, name, out, inputs)) as QuantMatrix;
    expect(matrix.bits).toBe(3);
    const found = (await matrix.dequantize()).toArray();
    expect([...found].every(Number.isFinite)).toBe(true);
    const rtn = await native().quantizeRtn(w, {
      bits: 3,
      groupSize: 32,
      symmetric: false,
      clipSearch: false,
    });
    const rounded = (await rtn.dequantize()).toArray();
    outcome.errors.push({
      projection,
      found: relativeError(found, w.toArray()),
      rounded: relativeError(rounded, w.toArray()),
    });
    outcome.equalsRounding &&= Buffer.from(found.buffer).equals(Buffer.from(rounded.buffer));
  }
  return outcome;
}

test('the model does as it says', async () => {
  const model = await MoeModel.load(await withStarvedExpert(40));
  const { routing } = await model.forward(calibration[0]!, { routing: true });
  for (const { indices } of routing!) expect(indices).not.toContain(STARVED);
  model.dispose();
});

test.each([40, 85, 95, 100, 104, 1000])('an expert never chosen, %d below the others', async (dislike) => {
  const { report, errors } = await quantize(await withStarvedExpert(dislike));
  for (const { router } of report.layers) {
    expect(router!.expertTokens[0]).toBe(0);
    expect(router!.starvedExperts).toContain(STARVED);
  }
  // The weights stay about as close as rounding would leave them, however small the routing weights are.
  for (const { found, rounded } of errors) expect(found).toBeLessThan(1.7 * rounded);
});

test('nothing to top up with: rounded to nearest', async () => {
  const { report, equalsRounding } = await quantize(await withStarvedExpert(40), { minExpertTokens: 0 });
  for (const { router } of report.layers) {
    expect(router!.expertTokens[0]).toBe(0);
    expect(router!.starvedExperts).toEqual([]);
  }
  expect(equalsRounding).toBe(true);
});

test('topping up is calibration', async () => {
  const { equalsRounding } = await quantize(await withStarvedExpert(40));
  expect(equalsRounding).toBe(false);
});

test('more tokens wanted than there are', async () => {
  const { report } = await quantize(await withStarvedExpert(40), { minExpertTokens: 10 * TOKENS });
  for (const { router } of report.layers) expect(router!.starvedExperts).toEqual([0, 1, 2, 3, 4, 5, 6, 7]);
});

test('a single calibration token', async () => {
  const { report } = await quantize(await withStarvedExpert(40), { calibration: [[7]], samples: 1 });
  expect(report.calibration.tokens).toBe(1);
});
