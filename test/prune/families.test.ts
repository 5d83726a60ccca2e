/** PESF on every family: what it counts is what the family's own router chose. */
import { join } from 'node:path';
import { SUPPORTED_MODEL_TYPES } from '../../lib/architecture';
import { MoeModel } from '../../lib/model/model';
import { pruneExperts, pruneReport } from '../../lib/prune/pesf';
import { describeWith, shared } from '../checkpoint/helpers';
import { shows } from '../families/shows';
import { randomIds } from '../quantize/helpers';

const TOKENS = 96;

for (const family of SUPPORTED_MODEL_TYPES) {
  describeWith(`goldens/${family}/config.json`, `${family} ${shows(family, 'prune')}`, () => {
    let model: MoeModel;
    let ids: Int32Array;
    beforeAll(async () => {
      model = await MoeModel.load(join(shared, 'goldens', family));
      [ids] = randomIds(model.architecture.vocabSize, 1, TOKENS) as [Int32Array];
    });
    afterAll(() => model.dispose());

    test('the rare experts of the first MoE layer lose their tokens, the others keep weights and tokens', async () => {
      const alpha = 1;
      using pruned = pruneExperts(model, { alpha });
      const [full, result] = [
        await model.forward(ids, { routing: true }),
        await pruned.forward(ids, { routing: true }),
      ];
      const [before, after] = [full.routing![0]!, result.routing![0]!];
      const { experts, topK } = before;
      const counts = new Int32Array(experts);
      for (const e of before.indices) counts[e]!++;
      // Eq. 6.
      const gone = (e: number) => counts[e]! < ((TOKENS * topK) / experts) * alpha;
      const rare = counts.filter((_, e) => gone(e)).length;
      expect(rare).toBeGreaterThan(0);
      expect(rare).toBeLessThan(experts);
      expect([...after.indices]).toEqual([...before.indices].map((e) => (gone(e) ? -1 : e)));
      expect([...after.weights]).toEqual(
        [...before.weights].map((w, i) => (gone(before.indices[i]!) ? 0 : w)),
      );
      const { layers } = pruneReport(pruned);
      expect(layers.length).toBe(full.routing!.length);
      expect(layers[0]).toMatchObject({ layer: before.layer, sequences: 1, experts: rare / experts });
      expect(result.logits.every(Number.isFinite)).toBe(true);
      expect(result.logits).not.toEqual(full.logits);
    });

    test('without an expert that nobody chose, nothing changes', async () => {
      using pruned = pruneExperts(model, { alpha: 1e-6 });
      expect((await pruned.forward(ids)).logits).toEqual((await model.forward(ids)).logits);
    });
  });
}
