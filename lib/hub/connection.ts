/**
 * Requests to the hub: with the user's token, patient with broken connections and busy servers, which the client is not, and with
 * errors that say what would help.
 */
import { setTimeout as sleep } from 'node:timers/promises';
import { EacMoeError } from '../errors';
import { version } from '../version';
import type { HubSettings } from './settings';

/** Longest wait that a server may ask for. Seconds. */
const MAX_RETRY_AFTER = 300;

/** A failure that may be gone at the next try. */
export class Broken extends Error {
  constructor(
    message: string,
    /** Seconds that the server asks to wait. */
    readonly retryAfter = 0,
    cause?: unknown,
  ) {
    super(message, { cause });
  }
}

export class Connection {
  constructor(
    private readonly settings: HubSettings,
    private readonly repository: string,
    private readonly revision: string,
    private readonly signal?: AbortSignal,
  ) {}

  /** What the client calls in the place of fetch. Bodies are read whole, as they count as part of the try: use it for small ones. */
  fetcher(tries = this.settings.tries): typeof fetch {
    return (input, init) =>
      this.repeat(
        () =>
          this.request(String(input), init, async ({ status, headers }, body) => {
            const parts: Uint8Array[] = [];
            for await (const part of body) parts.push(part);
            return new Response(Buffer.concat(parts), { status, headers });
          }),
        { tries },
      );
  }

  /** Does it again while it throws `Broken`. `position` grows with progress, and after progress all tries are left. */
  async repeat<T>(
    attempt: () => Promise<T>,
    { tries = this.settings.tries, position = () => 0 }: { tries?: number; position?: () => number } = {},
  ): Promise<T> {
    for (let failures = 0, reached = position(); ;) {
      this.checkAborted();
      try {
        return await attempt();
      } catch (error) {
        this.checkAborted();
        if (!(error instanceof Broken)) throw error;
        if (position() > reached) [failures, reached] = [0, position()];
        if (++failures >= tries) {
          const often = failures > 1 ? `, ${failures} times in a row` : '';
          const kept = reached > 0 ? '; what has arrived is kept, and the next call fetches the rest' : '';
          throw this.error('HUB_UNAVAILABLE', `${error.message}${often}${kept}`, error);
        }
        const wait = Math.max(1000 * error.retryAfter, this.settings.pause * 2 ** (failures - 1));
        await sleep(wait, undefined, { signal: this.signal }).catch(() => this.checkAborted());
      }
    }
  }

  /**
   * One request. `use` gets the response's head and its body, which throws `Broken` when the connection breaks, is silent for too long, or
   * ends early.
   */
  async request<T>(
    url: string,
    init: RequestInit | undefined,
    use: (response: Response, body: AsyncIterable<Uint8Array>) => Promise<T>,
  ): Promise<T> {
    const { settings, signal } = this;
    const abort = new AbortController();
    const stop = () => abort.abort();
    const silence = setTimeout(stop, settings.timeout);
    signal?.addEventListener('abort', stop, { once: true });
    const broken = (cause: unknown) => {
      const { code, message } =
        (cause as { cause?: NodeJS.ErrnoException }).cause ?? (cause as NodeJS.ErrnoException);
      const why = abort.signal.aborted ? `no answer for ${settings.timeout / 1000} s` : (code ?? message);
      return new Broken(`${url}: the connection broke (${why})`, 0, cause);
    };
    async function* read(body: ReadableStream<Uint8Array> | null): AsyncGenerator<Uint8Array> {
      const reader = body?.getReader();
      try {
        for (;;) {
          const next = await reader?.read().catch((cause: unknown) => Promise.reject(broken(cause)));
          if (!next || next.done) return;
          silence.refresh();
          yield next.value;
        }
      } finally {
        await reader?.cancel().catch(() => undefined);
      }
    }
    try {
      const headers = this.#headers(url, init?.headers);
      const response = await fetch(url, { ...init, headers, signal: abort.signal }).catch((cause: unknown) =>
        Promise.reject(broken(cause)),
      );
      silence.refresh();
      if (!response.ok) throw await this.#refusal(url, response);
      return await use(response, read(response.body));
    } finally {
      clearTimeout(silence);
      signal?.removeEventListener('abort', stop);
      stop();
    }
  }

  error(code: EacMoeError['code'], message: string, cause?: unknown): EacMoeError {
    return new EacMoeError(code, `hf:${this.repository}@${this.revision}: ${message}`, { cause });
  }

  checkAborted(): void {
    const { signal } = this;
    if (signal?.aborted)
      throw new EacMoeError('ABORTED', 'the operation was aborted', { cause: signal.reason });
  }

  /** The token goes to the hub only; fetch drops it when a redirect leads elsewhere. (The client would refuse a mirror's tokens.) */
  #headers(url: string, given: RequestInit['headers']): Headers {
    const { endpoint, token } = this.settings;
    const headers = new Headers(given);
    headers.set('user-agent', `eac-moe/${version}; node/${process.versions.node}`);
    if (token && new URL(url).origin === new URL(endpoint).origin)
      headers.set('authorization', `Bearer ${token.value}`);
    return headers;
  }

  async #refusal(url: string, response: Response): Promise<Error> {
    const { status, headers } = response;
    const text = await response.text().catch(() => '');
    if (status === 408 || status === 429 || status >= 500)
      return new Broken(`${url}: the server answered ${status}`, retryAfter(headers.get('retry-after')));
    const { endpoint, token } = this.settings;
    const detail = headers.get('x-error-message') ?? jsonError(text);
    const said = detail ? ` (${detail})` : '';
    const kind = headers.get('x-error-code');
    const login = token
      ? `the token in ${token.from} may not read it`
      : 'HF_TOKEN is not set; give it a token that may read it';
    if (kind === 'RevisionNotFound') {
      const expected = 'expected a branch, a tag or a commit of the repository';
      return this.error('HUB_NOT_FOUND', `no such revision at ${endpoint}${said}: ${expected}`);
    }
    if (kind === 'GatedRepo' || (status === 403 && !response.redirected)) {
      const conditions = `see ${endpoint}/${this.repository} for its conditions`;
      return this.error(
        'HUB_DENIED',
        `access to the repository is restricted${said}: ${conditions}; ${login}`,
      );
    }
    if (status === 404 && kind === 'EntryNotFound')
      return this.error('HUB_NOT_FOUND', `${url}: no such file${said}`);
    if (kind === 'RepoNotFound' || status === 404) {
      const hidden = `or it is private and ${login}`;
      return this.error('HUB_NOT_FOUND', `no such model at ${endpoint}${said}; check the name, ${hidden}`);
    }
    if (status === 401) return this.error('HUB_DENIED', `${endpoint} asks for a token${said}: ${login}`);
    return this.error('HUB_UNAVAILABLE', `${url}: the server answered ${status}${said}`);
  }
}

/** Seconds, or a date. */
function retryAfter(value: string | null): number {
  const seconds = /^\d+$/.test(value ?? '') ? Number(value) : (Date.parse(value ?? '') - Date.now()) / 1000;
  return Math.min(MAX_RETRY_AFTER, Math.max(0, seconds || 0));
}

function jsonError(text: string): string {
  try {
    const { error } = JSON.parse(text) as { error?: unknown };
    return typeof error === 'string' ? error : '';
  } catch {
    return '';
  }
}
