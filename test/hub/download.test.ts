/** Models from a hub on this machine: what is downloaded, what breaks, what is kept. */
import { randomBytes } from 'node:crypto';
import {
  existsSync,
  lstatSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  rmSync,
  statSync,
  writeFileSync,
} from 'node:fs';
import { hostname } from 'node:os';
import { join } from 'node:path';
import { Snapshot, type DownloadOptions } from '../../lib/hub/snapshot';
import type { HubSettings } from '../../lib/hub/settings';
import { expectRejection, scratch } from '../checkpoint/helpers';
import { gitHash, hashOf, sha256, TestHub, type Repository } from './server';

const NAME = 'test/model';
const root = scratch();
const hub = new TestHub();
const first = randomBytes(300_000);
const second = randomBytes(200_000);
const SHARDS = ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors'] as const;
const [A, B] = SHARDS;
const LFS_A = new RegExp(`/lfs/${sha256(first)}`);
const NEEDED: Record<string, string | Buffer> = {
  'config.json': '{"model_type":"mixtral"}',
  'generation_config.json': '{}',
  'model.safetensors.index.json': JSON.stringify({ weight_map: { a: A, b: B } }),
  'tokenizer.json': '{"tokenizer":"ü"}',
  'chat_template.jinja': '{{ messages }}',
  [A]: first,
  [B]: second,
};
const OTHER = {
  'README.md': '# model',
  'pytorch_model.bin': randomBytes(1000),
  'consolidated.safetensors': randomBytes(1000),
  'model.gguf': 'GGUF',
  'original/consolidated.safetensors': randomBytes(1000),
  'metal/model.bin': 'x',
};

let cache: string;
let folder: string;
let repository: Repository;

beforeAll(() => hub.start());
afterAll(() => hub.stop());
beforeEach(() => {
  cache = join(root, `cache-${randomBytes(4).toString('hex')}`);
  folder = join(cache, 'models--test--model');
  hub.repositories.clear();
  repository = hub.add(NAME, { ...NEEDED, ...OTHER });
  hub.requests.length = hub.faults.length = 0;
});
afterEach(() => expect(hub.faults).toEqual([]));

function get(reference = `hf:${NAME}`, settings: Partial<HubSettings> = {}, options: DownloadOptions = {}) {
  const base = { endpoint: hub.endpoint, cache, timeout: 5000, tries: 4, pause: 1 };
  return new Snapshot(reference, { ...base, ...settings }, options).directory();
}

/** The directory holds what the repository has of these files. */
function expectFiles(directory: string, names = Object.keys(NEEDED), of = repository) {
  expect(readdirSync(directory).sort()).toEqual([...names].sort());
  for (const name of names)
    expect(readFileSync(join(directory, name)).equals(of.files.get(name)!)).toBe(true);
}
/** An address that nobody listens at. */
async function closed(): Promise<string> {
  const gone = await new TestHub().start();
  await gone.stop();
  return gone.endpoint;
}
const blob = (name: string) => join(folder, 'blobs', hashOf(name, repository.files.get(name)!));

describe('a download', () => {
  test('brings what a model is loaded from, in the layout of the shared cache', async () => {
    const directory = await get();
    expect(directory).toBe(join(folder, 'snapshots', repository.commit));
    expectFiles(directory);
    expect(readFileSync(join(folder, 'refs', 'main'), 'utf8')).toBe(repository.commit);
    expect(readlinkSync(join(directory, A))).toBe(`../../blobs/${sha256(first)}`);
    expect(readlinkSync(join(directory, 'config.json'))).toBe(
      `../../blobs/${gitHash(Buffer.from(NEEDED['config.json']!))}`,
    );
    expect(readdirSync(join(folder, 'blobs')).length).toBe(Object.keys(NEEDED).length);
    expect(readdirSync(join(cache, '.locks', 'models--test--model'))).toEqual([]);
  });

  test('is not repeated: the second call asks for the commit and the listing only', async () => {
    await get();
    hub.requests.length = 0;
    await get();
    expect(hub.requests.every(({ url }) => url.startsWith('/api/models/test/model/'))).toBe(true);
    expect(hub.requests.length).toBeGreaterThan(0);
  });

  test('takes model.safetensors alone where there is one', async () => {
    const { 'model.safetensors.index.json': _, ...files } = NEEDED;
    repository = hub.add(NAME, { ...files, 'model.safetensors': second });
    expectFiles(await get(), [
      'config.json',
      'generation_config.json',
      'tokenizer.json',
      'chat_template.jinja',
      'model.safetensors',
    ]);
  });

  test('reports progress that ends at 1', async () => {
    const seen: number[] = [];
    await get(undefined, {}, { onProgress: ({ fraction, totalBytes }) => totalBytes && seen.push(fraction) });
    expect(seen.at(-1)).toBe(1);
    expect([...seen].sort((a, b) => a - b)).toEqual(seen);
  });

  test('brings files of equal content once', async () => {
    repository = hub.add(NAME, {
      ...NEEDED,
      'generation_config.json': '{}',
      'tokenizer.json': '{}',
      [B]: first,
    });
    expectFiles(await get());
    expect(hub.sent(LFS_A)).toBe(300_000);
    expect(hub.requests.filter(({ url }) => /resolve.*json$/.test(url)).length).toBe(3);
  });

  test.each([
    ['branch', 'next'],
    ['nested branch', 'refs/pr/1'],
    ['tag', 'v1.0'],
  ])('of a %s', async (_, revision) => {
    const old = repository.commit;
    repository = hub.add(NAME, { ...NEEDED, 'tokenizer.json': '{"a":1}' });
    repository.revisions = { main: old, [revision]: repository.commit };
    expectFiles(await get(`hf:${NAME}@${revision}`));
    expect(readFileSync(join(folder, 'refs', revision), 'utf8')).toBe(repository.commit);
  });

  test('of a commit writes no ref', async () => {
    expectFiles(await get(`hf:${NAME}@${repository.commit}`));
    expect(existsSync(join(folder, 'refs'))).toBe(false);
  });

  test('of a new commit takes the files that did not change from the cache', async () => {
    await get();
    repository = hub.add(NAME, { ...NEEDED, [B]: randomBytes(1234) });
    hub.requests.length = 0;
    expectFiles(await get());
    expect(hub.sent()).toBe(1234);
    expect(readFileSync(join(folder, 'refs', 'main'), 'utf8')).toBe(repository.commit);
  });

  test.each([
    'hf:model',
    'hf:a/b/c',
    'hf:a/..',
    'hf:a/b@',
    'hf:a/b@../x',
    'hf:a/b@x/../../y',
    'hf:a--b/c',
    'hf:/b',
  ])('%s is no name of a model', async (name) => {
    await expectRejection((async () => get(name))(), 'INVALID_ARGUMENT', name, 'hf:<owner>/<name>');
    expect(hub.requests).toEqual([]);
  });

  test('a hash that leads out of the cache is refused', async () => {
    const entry = { type: 'file', path: 'config.json', size: 1, oid: '../../../../evil' };
    const body = JSON.stringify([entry, { ...entry, path: 'model.safetensors' }]);
    hub.faults.push({ url: /\/tree\//, status: 200, body });
    await expectRejection(get(), 'HUB_UNAVAILABLE', 'config.json', 'without a hash');
  });
});

describe('a broken connection', () => {
  test('goes on where it broke', async () => {
    hub.faults.push({ url: LFS_A, cutAfter: 100_000 }, { url: LFS_A, cutAfter: 50_000 });
    expectFiles(await get());
    const ranges = hub.requests.filter(({ url }) => LFS_A.test(url)).map(({ range }) => range);
    expect(ranges).toHaveLength(3);
    const starts = ranges.map((range) => Number(/^bytes=(\d+)-$/.exec(range!)![1]));
    // What was on its way when the connection broke may be lost: no more than that is sent again.
    expect(starts[0]).toBe(0);
    expect(starts[1]).toBeGreaterThan(0);
    expect(starts[2]).toBeGreaterThanOrEqual(starts[1]!);
    expect(hub.sent(LFS_A)).toBe(300_000 + (100_000 - starts[1]!) + (50_000 - (starts[2]! - starts[1]!)));
  });

  test('that stays broken is an error, and the next call fetches the rest only', async () => {
    hub.faults.push({ url: LFS_A, cutAfter: 100_000 }, { url: LFS_A, cutAfter: 0, times: 4 });
    await expectRejection(get(), 'HUB_UNAVAILABLE', A, '4 times in a row', 'is kept');
    const kept = statSync(`${blob(A)}.incomplete`).size;
    expect(kept).toBeGreaterThan(0);
    expect(existsSync(blob(A))).toBe(false);
    expect(existsSync(join(folder, 'refs'))).toBe(false);
    hub.requests.length = 0;
    expectFiles(await get());
    expect(hub.sent(LFS_A)).toBe(300_000 - kept);
  });

  test('that is silent is broken', async () => {
    hub.faults.push({ url: LFS_A, stallAfter: 65_536 });
    expectFiles(await get(undefined, { timeout: 150 }));
    expect(hub.requests.filter(({ url }) => LFS_A.test(url)).length).toBe(2);
  });

  test('a server that never answers', async () => {
    const silent = new TestHub();
    await silent.start();
    silent.add(NAME, NEEDED);
    silent.faults.push({ url: /lfs/, stallAfter: 0, times: 99 });
    await expectRejection(
      get(undefined, { endpoint: silent.endpoint, timeout: 50 }),
      'HUB_UNAVAILABLE',
      'no answer for 0.05 s',
    );
    await silent.stop();
  });

  test('nobody listens', async () => {
    const endpoint = await closed();
    await expectRejection(get(undefined, { endpoint }), 'HUB_UNAVAILABLE', endpoint, '4 times in a row');
  });

  test.each([
    [429, { 'retry-after': '0' }],
    [500, {}],
    [503, { 'retry-after': 'Thu, 01 Jan 1970 00:00:00 GMT' }],
  ])('status %d is tried again', async (status, headers) => {
    hub.faults.push(
      { url: /\/revision\//, status, headers: headers as Record<string, string> },
      { url: /\/tree\//, status, times: 2 },
      { url: /\/resolve\/.*00001/, status },
    );
    expectFiles(await get());
  });

  test('a server without ranges: everything again, once', async () => {
    hub.faults.push({ url: LFS_A, cutAfter: 100_000 }, { url: LFS_A, ignoreRange: true });
    expectFiles(await get());
  });

  test('content of another hash is not put in place', async () => {
    hub.faults.push({ url: LFS_A, damage: true, times: 2 });
    await expectRejection(get(), 'HUB_UNAVAILABLE', A, 'SHA-256', sha256(first));
    expect(existsSync(blob(A))).toBe(false);
    expect(existsSync(`${blob(A)}.incomplete`)).toBe(false);
  });

  test('the same for a file that is not in LFS', async () => {
    hub.faults.push({ url: /\/tokenizer\.json/, damage: true, times: 2 });
    await expectRejection(get(), 'HUB_UNAVAILABLE', 'tokenizer.json', 'git hash');
    expect(existsSync(blob('tokenizer.json'))).toBe(false);
  });

  test('damage in what an earlier run left is found, and the file fetched anew', async () => {
    mkdirSync(join(folder, 'blobs'), { recursive: true });
    writeFileSync(`${blob(A)}.incomplete`, Buffer.alloc(100_000, 1));
    writeFileSync(`${blob(B)}.incomplete`, Buffer.alloc(1_000_000, 1));
    expectFiles(await get());
    expect(hub.sent(LFS_A)).toBe(200_000 + 300_000);
  });

  test('more than the hub lists is refused', async () => {
    const tree = [...repository.files].map(([path, data]) => ({
      type: 'file',
      path,
      size: 10,
      oid: gitHash(data),
      ...(path.endsWith('.safetensors') && { lfs: { oid: sha256(data), size: 10, pointerSize: 1 } }),
    }));
    hub.faults.push({ url: /\/tree\//, status: 200, body: JSON.stringify(tree) });
    hub.faults.push({ url: /\/resolve\//, ignoreRange: true, times: 4 });
    await expectRejection(get(), 'HUB_UNAVAILABLE', 'more than the 10 bytes');
    hub.faults.length = 0;
  });
});

describe('abort', () => {
  test('ends a slow download at once; the next call goes on', async () => {
    hub.faults.push({ url: /\/lfs\//, slow: 20, times: 2 });
    const controller = new AbortController();
    const reason = new Error('enough');
    const onProgress = ({ bytes }: { bytes: number }) => bytes > 50_000 && controller.abort(reason);
    await expectRejection(get(undefined, {}, { signal: controller.signal, onProgress }), 'ABORTED');
    const kept = [A, B].map((name) => statSync(`${blob(name)}.incomplete`).size);
    expect(Math.max(...kept)).toBeGreaterThan(0);
    expect(readdirSync(join(cache, '.locks', 'models--test--model'))).toEqual([]);
    hub.requests.length = 0;
    expectFiles(await get());
    expect(hub.sent(/\/lfs\//)).toBe(500_000 - kept[0]! - kept[1]!);
  });

  test('before it begins', async () => {
    await expectRejection(get(undefined, {}, { signal: AbortSignal.abort() }), 'ABORTED');
    expect(hub.requests).toEqual([]);
  });

  test('while it waits for as long as a busy server asked', async () => {
    hub.faults.push({ url: /\/revision\//, status: 503, headers: { 'retry-after': '300' } });
    await expectRejection(get(undefined, {}, { signal: AbortSignal.timeout(100) }), 'ABORTED');
    expect(hub.requests.length).toBe(1);
  });

  test('while it waits for another process', async () => {
    const lock = join(cache, '.locks', 'models--test--model');
    mkdirSync(lock, { recursive: true });
    writeFileSync(join(lock, 'eac-moe.lock'), 'of another machine');
    await expectRejection(get(undefined, {}, { signal: AbortSignal.timeout(400) }), 'ABORTED');
    expect(hub.sent()).toBe(0);
  });
});

describe('two at a time', () => {
  test('download once', async () => {
    hub.faults.push({ url: /\/lfs\//, slow: 5, times: 2 });
    const [one, two] = await Promise.all([get(), get()]);
    expect(one).toBe(two);
    expectFiles(one);
    expect(hub.sent(/\/lfs\//)).toBe(500_000);
  });

  test('a lock whose process is dead is taken over', async () => {
    const lock = join(cache, '.locks', 'models--test--model');
    mkdirSync(lock, { recursive: true });
    // Larger than any process id.
    writeFileSync(join(lock, 'eac-moe.lock'), `99999999 ${hostname()}`);
    expectFiles(await get());
  });
});

describe('what the hub refuses', () => {
  test('a repository that does not exist', async () => {
    await expectRejection(
      get('hf:test/none'),
      'HUB_NOT_FOUND',
      'hf:test/none@main',
      hub.endpoint,
      'HF_TOKEN',
    );
  });

  test('a revision that does not exist', async () => {
    await expectRejection(get(`hf:${NAME}@v9`), 'HUB_NOT_FOUND', `hf:${NAME}@v9`, 'revision', 'branch');
  });

  test('a private repository: with the token only, which stays with the hub', async () => {
    repository.token = 'hf_secret';
    await expectRejection(get(), 'HUB_NOT_FOUND', 'private', 'HF_TOKEN');
    const wrong = { value: 'hf_wrong', from: 'HUGGING_FACE_HUB_TOKEN' };
    await expectRejection(
      get(undefined, { token: wrong }),
      'HUB_NOT_FOUND',
      'the token in HUGGING_FACE_HUB_TOKEN',
    );
    hub.requests.length = 0;
    expectFiles(await get(undefined, { token: { value: 'hf_secret', from: 'HF_TOKEN' } }));
    const to = (server: string) =>
      hub.requests.filter((r) => r.server === server).map((r) => r.authorization);
    expect(new Set(to('hub'))).toEqual(new Set(['Bearer hf_secret']));
    expect(new Set(to('cdn'))).toEqual(new Set([undefined]));
  });

  test('a gated repository', async () => {
    repository.gated = true;
    await expectRejection(
      get(),
      'HUB_DENIED',
      'restricted',
      `${hub.endpoint}/${NAME}`,
      'HF_TOKEN is not set',
    );
    const token = { value: 'hf_x', from: 'HF_TOKEN' };
    await expectRejection(get(undefined, { token }), 'HUB_DENIED', 'the token in HF_TOKEN may not read it');
  });

  test('a bad token', async () => {
    hub.faults.push({
      url: /\/revision\//,
      status: 401,
      body: '{"error":"Invalid credentials in Authorization header"}',
    });
    const token = { value: 'x', from: 'HF_TOKEN' };
    await expectRejection(get(undefined, { token }), 'HUB_DENIED', 'Invalid credentials', 'HF_TOKEN');
  });

  test('a page that is none of the hub', async () => {
    hub.faults.push({ url: /\/revision\//, status: 200, body: '<html>log in</html>' });
    await expectRejection(get(), 'HUB_UNAVAILABLE', hub.endpoint, 'does not answer as a hub does');
  });

  test('a repository without safetensors, before anything is downloaded', async () => {
    hub.add(NAME, { 'config.json': '{}', 'pytorch_model.bin': 'x' });
    await expectRejection(get(), 'HUB_NOT_FOUND', 'model.safetensors', 'pytorch_model.bin');
    expect(existsSync(folder)).toBe(false);
  });

  test('an index that lists a shard which is not there, before weights are downloaded', async () => {
    const { [B]: _, ...rest } = NEEDED;
    hub.add(NAME, rest);
    await expectRejection(get(), 'INVALID_CHECKPOINT', B);
    expect(hub.sent(/\/lfs\//)).toBe(0);
  });

  test('a disk that is too small', async () => {
    const lfs = { oid: sha256(first), size: 1e17, pointerSize: 1 };
    const oid = gitHash(Buffer.from('{}'));
    hub.add(NAME, { 'config.json': '{}', 'model.safetensors': first });
    const body = JSON.stringify([
      { type: 'file', path: 'config.json', size: 2, oid },
      { type: 'file', path: 'model.safetensors', size: 1e17, oid, lfs },
    ]);
    hub.faults.push({ url: /\/tree\//, status: 200, body });
    await expectRejection(get(), 'OUTPUT', cache, 'too full', '100000000.00 GB', 'HF_HUB_CACHE');
    expect(hub.sent(/\/lfs\//)).toBe(0);
  });

  test('a cache that cannot be written', async () => {
    writeFileSync(cache, 'a file');
    await expectRejection(get(), 'OUTPUT', cache);
  });
});

describe('without the network', () => {
  const offline = 'HF_HUB_OFFLINE';

  test('the cache is taken, by branch and by commit, and nothing asked', async () => {
    const directory = await get();
    hub.requests.length = 0;
    expect(await get(undefined, { offline })).toBe(directory);
    expect(await get(`hf:${NAME}@${repository.commit}`, { offline })).toBe(directory);
    expect(hub.requests).toEqual([]);
  });

  test('what is not in the cache is an error that names the variable', async () => {
    await expectRejection(get(undefined, { offline }), 'HUB_UNAVAILABLE', offline, cache);
    await get();
    await expectRejection(get(`hf:${NAME}@v1`, { offline }), 'HUB_UNAVAILABLE', `hf:${NAME}@v1`, offline);
  });

  test('an unfinished download is none', async () => {
    hub.faults.push({ url: LFS_A, cutAfter: 0, times: 4 });
    await expectRejection(get(`hf:${NAME}@${repository.commit}`), 'HUB_UNAVAILABLE');
    await expectRejection(
      get(`hf:${NAME}@${repository.commit}`, { offline }),
      'HUB_UNAVAILABLE',
      offline,
      'lacks',
      A,
    );
  });

  test('an update that breaks off leaves the branch where it was', async () => {
    const before = await get();
    const changed = randomBytes(5000);
    hub.add(NAME, { ...NEEDED, [B]: changed });
    hub.faults.push({ url: new RegExp(sha256(changed)), cutAfter: 0, times: 4 });
    await expectRejection(get(), 'HUB_UNAVAILABLE');
    expect(await get(undefined, { offline })).toBe(before);
  });

  test('when the hub does not answer, the cached revision is taken with a warning', async () => {
    const directory = await get();
    const warn = jest.spyOn(process, 'emitWarning').mockImplementation(() => undefined);
    try {
      expect(await get(undefined, { endpoint: await closed() })).toBe(directory);
      expect(warn).toHaveBeenCalledTimes(1);
      expect(warn.mock.calls[0]![0]).toMatch(/127\.0\.0\.1.*ECONNREFUSED.*Using the cached/);
    } finally {
      warn.mockRestore();
    }
    await expectRejection(get(`hf:${NAME}@v9`), 'HUB_NOT_FOUND');
  });

  test('a link whose content was deleted is made anew', async () => {
    const directory = await get();
    rmSync(blob(A));
    expect(lstatSync(join(directory, A)).isSymbolicLink()).toBe(true);
    expectFiles(await get());
  });
});
