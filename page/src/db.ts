/** The history of this browser (IndexedDB): chats, and their pictures beside them. */

import type { Chat } from "./chat";

export interface StoredPicture {
  id: string;
  name: string;
  width: number;
  height: number;
  blob: Blob;
}

const NAME = "seekvl";
let opened: Promise<IDBDatabase> | null = null;

function database(): Promise<IDBDatabase> {
  opened ??= new Promise((resolve, reject) => {
    const asked = indexedDB.open(NAME, 1);
    asked.onupgradeneeded = () => {
      asked.result.createObjectStore("chats", { keyPath: "id" });
      asked.result.createObjectStore("pictures", { keyPath: "id" });
    };
    asked.onsuccess = () => resolve(asked.result);
    asked.onerror = () => reject(asked.error ?? new Error("no history"));
  });
  return opened;
}

function done<T>(request: IDBRequest<T>): Promise<T> {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error ?? new Error("the history cannot be read"));
  });
}

async function store(name: "chats" | "pictures", mode: IDBTransactionMode): Promise<IDBObjectStore> {
  return (await database()).transaction(name, mode).objectStore(name);
}

export const chats = {
  all: async (): Promise<Chat[]> => done<Chat[]>((await store("chats", "readonly")).getAll()),
  put: async (chat: Chat) => done((await store("chats", "readwrite")).put(chat)),
  delete: async (id: string) => done((await store("chats", "readwrite")).delete(id)),
};

export const pictures = {
  get: async (id: string): Promise<StoredPicture | undefined> =>
    done<StoredPicture | undefined>((await store("pictures", "readonly")).get(id)),
  put: async (picture: StoredPicture) => done((await store("pictures", "readwrite")).put(picture)),
  keys: async () => done((await store("pictures", "readonly")).getAllKeys()),
  delete: async (id: string) => done((await store("pictures", "readwrite")).delete(id)),
};
