/** Progress for a log and for a terminal. */
import { PassThrough } from 'node:stream';
import type { WriteStream } from 'node:tty';
import { progressDisplay, timeLeft } from '../../lib/cli/progress';

function stream(terminal: boolean) {
  const sink = Object.assign(new PassThrough(), {
    isTTY: terminal,
    columns: 80,
    cursorTo() {},
    clearLine() {},
    moveCursor() {},
  });
  return { target: sink as unknown as WriteStream, text: () => String(sink.read() ?? '') };
}

test('time left', () => {
  expect(timeLeft(0, 100)).toBe('');
  expect(timeLeft(0.5, 0.1)).toBe('');
  expect(timeLeft(0.5, 9)).toBe('9s');
  expect(timeLeft(0.1, 15)).toBe('2m15s');
  expect(timeLeft(0.01, 100)).toBe('2h45m');
});

test('plain lines where there is no terminal: the first, each tenth, the last', () => {
  const { target, text } = stream(false);
  const display = progressDisplay(target);
  for (let i = 1; i <= 100; i++) display.update(i / 100, 'working');
  display.update(1, 'working');
  display.end();
  const lines = text().trimEnd().split('\n');
  expect(lines[0]).toBe('  1 % working');
  expect(lines.at(-1)).toBe('100 % working');
  expect(lines.length).toBeLessThanOrEqual(12);
});

test('a fraction that falls is the next job', () => {
  const { target, text } = stream(false);
  const display = progressDisplay(target);
  for (const message of ['downloading', 'working']) for (const f of [0, 1]) display.update(f, message);
  expect(text()).toBe('  0 % downloading\n100 % downloading\n  0 % working\n100 % working\n');
});

test('a bar on a terminal', () => {
  const { target, text } = stream(true);
  const display = progressDisplay(target);
  display.update(0.25, 'layer 1/4');
  display.end();
  display.end();
  expect(text()).toMatch(/25 % .*layer 1\/4/);
});
