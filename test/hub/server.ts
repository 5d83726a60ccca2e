/**
 * A hub on this machine: the part of its protocol that clients use to download models, served by node:http. Content of LFS files comes by a
 * redirect from a second server, as it does from the hub's CDN. Faults are put in front of single answers.
 */
import { createHash } from 'node:crypto';
import { createServer, type IncomingMessage, type Server, type ServerResponse } from 'node:http';
import type { AddressInfo } from 'node:net';

/** What happens to the next answers to requests whose URL matches. */
export interface Fault {
  url: RegExp;
  /** Answers that it happens to; default 1. */
  times?: number;
  /** Answers with this status and headers. */
  status?: number;
  headers?: Record<string, string>;
  body?: string;
  /** Breaks the connection after so many bytes of the body. */
  cutAfter?: number;
  /** Sends so many bytes of the body, and then nothing more. */
  stallAfter?: number;
  /** Changes a byte. */
  damage?: boolean;
  /** Answers 200 with the whole body. */
  ignoreRange?: boolean;
  /** Milliseconds before each piece of PIECE bytes. */
  slow?: number;
}

export interface Repository {
  commit: string;
  revisions: Record<string, string>;
  /** By path; files of the first level and below. */
  files: Map<string, Buffer>;
  /** Needed to see it. */
  token?: string;
  /** Its content needs acceptance, which no account has given. */
  gated?: boolean;
}

export interface Request {
  server: 'hub' | 'cdn';
  url: string;
  method: string;
  range?: string;
  authorization?: string;
  /** Of the body. */
  sent: number;
}

const PIECE = 16384;
/** Entries a page of a listing. */
const PAGE = 4;

const digest = (kind: string, ...parts: (string | Buffer)[]) =>
  parts.reduce((hash, part) => hash.update(part), createHash(kind)).digest('hex');
export const sha256 = (data: Buffer) => digest('sha256', data);
export const gitHash = (data: Buffer) => digest('sha1', `blob ${data.byteLength}\0`, data);
const isLfs = (path: string) => /\.(safetensors|bin)$/.test(path);
export const hashOf = (path: string, data: Buffer) => (isLfs(path) ? sha256(data) : gitHash(data));

export class TestHub {
  readonly repositories = new Map<string, Repository>();
  readonly requests: Request[] = [];
  readonly faults: Fault[] = [];
  endpoint = '';
  #cdn = '';
  #servers: Server[] = [];

  async start(): Promise<this> {
    const listen = async (name: Request['server'], answer: (r: IncomingMessage, s: Answer) => void) => {
      const server = createServer((request, response) => {
        const { url = '', method = 'GET', headers } = request;
        const { range, authorization } = headers;
        const entry: Request = { server: name, url, method, range, authorization, sent: 0 };
        this.requests.push(entry);
        const sender = new Answer(request, response, entry, this.#fault(url));
        if (!sender.refused()) answer(request, sender);
      });
      await new Promise<void>((done) => server.listen(0, '127.0.0.1', done));
      this.#servers.push(server);
      return (server.address() as AddressInfo).port;
    };
    const port = await listen('hub', (request, answer) => this.#answer(request, answer));
    this.endpoint = `http://127.0.0.1:${port}`;
    const other = await listen('cdn', ({ url = '' }, answer) => {
      const [, hash] = /^\/lfs\/(\w+)\?signature=/.exec(url) ?? [];
      const all = [...this.repositories.values()].flatMap(({ files }) => [...files.values()]);
      const data = all.find((content) => sha256(content) === hash);
      if (data) void answer.content(data, {});
      else answer.json(404, {});
    });
    // Another host, for which a token is not meant.
    this.#cdn = `http://localhost:${other}`;
    return this;
  }

  async stop(): Promise<void> {
    for (const server of this.#servers.splice(0)) {
      server.closeAllConnections();
      await new Promise((done) => server.close(done));
    }
  }

  /** Adds a repository whose branch main is at a commit made of its content. */
  add(name: string, files: Record<string, string | Buffer>, rest: Partial<Repository> = {}): Repository {
    const content = new Map(Object.entries(files).map(([path, data]) => [path, Buffer.from(data)]));
    const commit = digest('sha1', name, ...[...content].flat());
    const repository = { commit, revisions: { main: commit }, files: content, ...rest };
    this.repositories.set(name, repository);
    return repository;
  }

  /** Bytes of content sent so far for URLs that match. */
  sent(url = /\/lfs\/|\/resolve\//): number {
    return this.requests.filter((r) => url.test(r.url)).reduce((sum, r) => sum + r.sent, 0);
  }

  #fault(url: string): Fault | undefined {
    const fault = this.faults.find((f) => f.url.test(url));
    if (fault && (fault.times = (fault.times ?? 1) - 1) <= 0)
      this.faults.splice(this.faults.indexOf(fault), 1);
    return fault;
  }

  #answer({ url = '', headers }: IncomingMessage, answer: Answer): void {
    const { pathname, searchParams } = new URL(url, this.endpoint);
    const parts = pathname.split('/').filter(Boolean).map(decodeURIComponent);
    const api = parts[0] === 'api' && parts[1] === 'models';
    const [owner, name, verb, revision = '', ...path] = api ? parts.slice(2) : parts;
    const repository = this.repositories.get(`${owner}/${name}`);
    const token = headers.authorization?.replace('Bearer ', '');
    if (!repository || (repository.token && repository.token !== token)) {
      // As the hub does: who is not logged in is not told whether it exists.
      return answer.error(token ? 404 : 401, 'RepoNotFound', 'Repository not found');
    }
    const known = Object.values(repository.revisions).includes(revision) || revision === repository.commit;
    const commit = repository.revisions[revision] ?? (known ? revision : undefined);
    if (!commit) return answer.error(404, 'RevisionNotFound', `Invalid rev id: ${revision}`);
    if (api && verb === 'revision') {
      const siblings = [...repository.files.keys()].map((rfilename) => ({ rfilename }));
      const info = { _id: '1', id: `${owner}/${name}`, modelId: `${owner}/${name}`, sha: commit, siblings };
      return answer.json(200, {
        ...info,
        private: !!repository.token,
        gated: false,
        downloads: 0,
        likes: 0,
        tags: [],
      });
    }
    if (api && verb === 'tree') return this.#tree(repository, pathname, searchParams, answer);
    if (repository.gated) return answer.error(403, 'GatedRepo', 'Access to this model is restricted');
    const file = path.join('/');
    const data = repository.files.get(file);
    if (verb !== 'resolve' || !data) return answer.error(404, 'EntryNotFound', 'Entry not found');
    if (!isLfs(file)) {
      return void answer.content(data, { etag: `"${gitHash(data)}"`, 'x-repo-commit': commit });
    }
    answer.redirect(`${this.#cdn}/lfs/${sha256(data)}?signature=1`, {
      'x-repo-commit': commit,
      'x-linked-etag': `"${sha256(data)}"`,
      'x-linked-size': String(data.byteLength),
    });
  }

  #tree({ files }: Repository, pathname: string, query: URLSearchParams, answer: Answer): void {
    const deep = query.get('recursive')?.toLowerCase() === 'true';
    const folders = new Set([...files.keys()].flatMap((path) => /^(.*)\//.exec(path)?.[1] ?? []));
    const all = [
      ...[...folders].map((path) => ({ type: 'directory', oid: gitHash(Buffer.from(path)), size: 0, path })),
      ...[...files].flatMap(([path, data]) => {
        if (!deep && path.includes('/')) return [];
        const pointer = Buffer.from(`version https://git-lfs.github.com/spec/v1\noid sha256:${sha256(data)}`);
        const lfs = { oid: sha256(data), size: data.byteLength, pointerSize: pointer.byteLength };
        return isLfs(path)
          ? { type: 'file', oid: gitHash(pointer), size: data.byteLength, path, lfs }
          : { type: 'file', oid: gitHash(data), size: data.byteLength, path };
      }),
    ];
    const from = Number(query.get('cursor') ?? 0);
    const next = `${this.endpoint}${pathname}?recursive=${deep}&expand=false&cursor=${from + PAGE}`;
    const headers: Record<string, string> = from + PAGE < all.length ? { link: `<${next}>; rel="next"` } : {};
    answer.json(200, all.slice(from, from + PAGE), headers);
  }
}

/** One answer, and what is to go wrong with it. */
class Answer {
  constructor(
    private readonly request: IncomingMessage,
    private readonly response: ServerResponse,
    private readonly entry: Request,
    private readonly fault: Fault | undefined,
  ) {}

  /** True where the fault takes the place of the answer. */
  refused(): boolean {
    if (this.fault?.status === undefined) return false;
    this.response.writeHead(this.fault.status, this.fault.headers).end(this.fault.body ?? '');
    return true;
  }

  json(status: number, value: unknown, headers: Record<string, string> = {}): void {
    this.response
      .writeHead(status, { 'content-type': 'application/json', ...headers })
      .end(JSON.stringify(value));
  }

  error(status: number, kind: string, message: string): void {
    this.json(status, { error: message }, { 'x-error-code': kind, 'x-error-message': message });
  }

  redirect(location: string, headers: Record<string, string>): void {
    this.response.writeHead(302, { location, ...headers }).end();
  }

  async content(data: Buffer, headers: Record<string, string>): Promise<void> {
    const { fault = { url: / / }, request, response } = this;
    const [, first, last] = /^bytes=(\d+)-(\d*)$/.exec(request.headers.range ?? '') ?? [];
    const ranged = first !== undefined && !fault.ignoreRange;
    const [from, to] = ranged
      ? [Number(first), last ? Number(last) + 1 : data.byteLength]
      : [0, data.byteLength];
    const body = Buffer.from(data.subarray(from, Math.min(to, data.byteLength)));
    if (fault.damage) body[body.byteLength >> 1]! ^= 1;
    const range = { 'content-range': `bytes ${from}-${from + body.byteLength - 1}/${data.byteLength}` };
    response.writeHead(ranged ? 206 : 200, {
      'content-length': body.byteLength,
      'accept-ranges': 'bytes',
      ...(ranged && range),
      ...headers,
    });
    if (request.method === 'HEAD') return void response.end();
    const end = Math.min(fault.cutAfter ?? Infinity, fault.stallAfter ?? Infinity, body.byteLength);
    for (let at = 0; at < end && !response.destroyed; at += PIECE) {
      if (fault.slow) await new Promise((done) => setTimeout(done, fault.slow));
      const piece = body.subarray(at, Math.min(at + PIECE, end));
      await new Promise((done) => response.write(piece, done));
      this.entry.sent += piece.byteLength;
    }
    if (fault.stallAfter !== undefined) return;
    if (fault.cutAfter !== undefined) response.destroy();
    else response.end();
  }
}
