use super::*;
use finetune_common::digest::sha256;
use finetune_store::StoreOptions;

fn key(n: usize) -> Sha256Digest {
    sha256(format!("entry {n}").as_bytes())
}

fn tensor(n: usize) -> HostTensor {
    HostTensor::new((0..300).map(|i| (n + i) as f32).collect(), [3, 100]).unwrap()
}

fn pixels(n: usize) -> Vec<u8> {
    (0..300).map(|i| (n + i) as u8).collect()
}

fn put(cache: &mut TensorCache, n: usize) {
    let pixels = CachedTensor::u8(pixels(n), &[10, 10, 3]).unwrap();
    cache.put(key(n), &[("mean", CachedTensor::f32(&tensor(n))), ("pixels", pixels)]).unwrap();
}

fn check(cache: &TensorCache, n: usize) {
    let mean = cache.get(&key(n), "mean").unwrap().unwrap();
    assert_eq!((mean.dtype(), mean.shape()), (Dtype::F32, &[3, 100][..]));
    assert_eq!(mean.to_f32().unwrap(), tensor(n));
    let picture = cache.get(&key(n), "pixels").unwrap().unwrap();
    assert_eq!((picture.dtype(), picture.shape(), picture.bytes()), (Dtype::U8, &[10, 10, 3][..], &pixels(n)[..]));
    assert!(matches!(picture.to_f32(), Err(CacheError::Dtype { dtype: Dtype::U8 })));
    assert!(cache.get(&key(n), "logvar").unwrap().is_none());
}

fn packs(dir: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).collect();
    paths.sort();
    paths
}

fn store(dir: &Path) -> Store {
    Store::open(dir.to_str().unwrap(), &StoreOptions::default()).unwrap()
}

#[tokio::test]
async fn entries_survive_in_packs_of_bounded_size_and_are_not_written_twice() {
    let dir = tempfile::tempdir().unwrap();
    let mut cache = TensorCache::with_pack_bytes(dir.path(), None, 4000).await.unwrap();
    for n in 0..10 {
        put(&mut cache, n);
        check(&cache, n);
    }
    cache.flush().await.unwrap();
    // An entry has 1,800 bytes; a pack is closed when it reaches 4,000.
    assert_eq!(packs(dir.path()).len(), 4);
    drop(cache);
    let mut cache = TensorCache::open(dir.path(), None).await.unwrap();
    for n in 0..10 {
        assert!(cache.contains(&key(n)));
        put(&mut cache, n);
        check(&cache, n);
    }
    assert!(!cache.contains(&key(10)) && cache.get(&key(10), "mean").unwrap().is_none());
    cache.flush().await.unwrap();
    assert_eq!(packs(dir.path()).len(), 4);
}

#[tokio::test]
async fn a_killed_preparation_keeps_its_finished_packs() {
    let dir = tempfile::tempdir().unwrap();
    let mut cache = TensorCache::with_pack_bytes(dir.path(), None, 4000).await.unwrap();
    (0..5).for_each(|n| put(&mut cache, n));
    drop(cache); // without flush: entries 3 and 4 were in memory
    let cache = TensorCache::open(dir.path(), None).await.unwrap();
    let found: Vec<usize> = (0..5).filter(|n| cache.contains(&key(*n))).collect();
    assert_eq!(found, [0, 1, 2]);
}

#[tokio::test]
async fn damaged_packs_are_dropped_and_made_again() {
    for damage in ["flip", "cut", "header", "empty"] {
        let dir = tempfile::tempdir().unwrap();
        let mut cache = TensorCache::open(dir.path(), None).await.unwrap();
        (0..3).for_each(|n| put(&mut cache, n));
        cache.flush().await.unwrap();
        put(&mut cache, 3);
        cache.flush().await.unwrap();
        let victim = packs(dir.path()).into_iter().max_by_key(|p| p.metadata().unwrap().len()).unwrap();
        drop(cache);
        let mut bytes = std::fs::read(&victim).unwrap();
        match damage {
            "flip" => *bytes.last_mut().unwrap() ^= 1,
            "cut" => bytes.truncate(bytes.len() - 100),
            "header" => bytes[9] = b'!',
            _ => bytes.clear(),
        }
        std::fs::write(&victim, bytes).unwrap();
        let mut cache = TensorCache::open(dir.path(), None).await.unwrap();
        let found: Vec<usize> = (0..4).filter(|n| cache.contains(&key(*n))).collect();
        assert_eq!(found, [3], "{damage}");
        assert!(cache.get(&key(0), "mean").unwrap().is_none());
        (0..3).for_each(|n| put(&mut cache, n));
        cache.flush().await.unwrap();
        (0..4).for_each(|n| check(&cache, n));
        drop(cache);
        let cache = TensorCache::open(dir.path(), None).await.unwrap();
        (0..4).for_each(|n| check(&cache, n));
    }
}

#[tokio::test]
async fn a_mirror_serves_another_machine_also_with_what_another_job_had_left() {
    let (shared, elsewhere, bucket) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    // Another job, without this mirror.
    let mut other = TensorCache::open(shared.path(), None).await.unwrap();
    (0..2).for_each(|n| put(&mut other, n));
    other.flush().await.unwrap();
    put(&mut other, 2);
    other.flush().await.unwrap();
    drop(other);
    // This job needs entries 0 and 1, and makes 5.
    let mut cache = TensorCache::open(shared.path(), Some(store(bucket.path()))).await.unwrap();
    assert!((0..2).all(|n| cache.contains(&key(n))));
    put(&mut cache, 5);
    cache.flush().await.unwrap();
    drop(cache);
    assert_eq!(packs(bucket.path()).len(), 2, "the pack with entry 2 is not needed");
    let mut cache = TensorCache::open(elsewhere.path(), Some(store(bucket.path()))).await.unwrap();
    for n in [0, 1, 5] {
        check(&cache, n);
    }
    assert!(!cache.contains(&key(2)));
    cache.flush().await.unwrap();
    assert_eq!(packs(bucket.path()).len(), 2);
}

#[tokio::test]
async fn finished_packs_reach_the_mirror_before_the_end() {
    let (dir, elsewhere, bucket) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut cache = TensorCache::with_pack_bytes(dir.path(), Some(store(bucket.path())), 1000).await.unwrap();
    put(&mut cache, 0);
    while store(bucket.path()).list("").await.unwrap().is_empty() {
        tokio::task::yield_now().await;
    }
    let cache = TensorCache::open(elsewhere.path(), Some(store(bucket.path()))).await.unwrap();
    check(&cache, 0);
}

#[tokio::test]
async fn a_damaged_pack_in_the_mirror_is_replaced() {
    let (dir, elsewhere, bucket) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut cache = TensorCache::open(dir.path(), Some(store(bucket.path()))).await.unwrap();
    put(&mut cache, 0);
    cache.flush().await.unwrap();
    let object = packs(bucket.path()).remove(0);
    let good = std::fs::read(&object).unwrap();
    std::fs::write(&object, &good[..good.len() - 1]).unwrap();
    let mut cache = TensorCache::open(elsewhere.path(), Some(store(bucket.path()))).await.unwrap();
    assert!(!cache.contains(&key(0)));
    put(&mut cache, 0);
    cache.flush().await.unwrap();
    assert_eq!(std::fs::read(&object).unwrap(), good);
}

#[tokio::test]
async fn two_writers_share_a_folder_and_a_mirror() {
    let (dir, bucket) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut writers = Vec::new();
    for range in [0..40, 20..60] {
        let (path, mirror) = (dir.path().to_owned(), store(bucket.path()));
        writers.push(tokio::spawn(async move {
            let mut cache = TensorCache::with_pack_bytes(&path, Some(mirror), 5000).await.unwrap();
            for n in range {
                put(&mut cache, n);
                tokio::task::yield_now().await;
            }
            cache.flush().await.unwrap();
        }));
    }
    for writer in writers {
        writer.await.unwrap();
    }
    let empty = tempfile::tempdir().unwrap();
    for (dir, mirror) in [(dir.path(), None), (empty.path(), Some(store(bucket.path())))] {
        let cache = TensorCache::open(dir, mirror).await.unwrap();
        (0..60).for_each(|n| check(&cache, n));
    }
}

#[test]
fn keys_tell_apart_all_that_matters() {
    let transform = Transform { size: (64, 64), flip: false, top: 1, left: 0 };
    let (a, b) = (sha256(b"a"), sha256(b"b"));
    let base = latents_key(&a, &transform, &b);
    for other in [
        latents_key(&b, &transform, &b),
        latents_key(&a, &transform, &a),
        latents_key(&a, &Transform { flip: true, ..transform }, &b),
        latents_key(&a, &Transform { top: 0, left: 1, ..transform }, &b),
        latents_key(&a, &Transform { size: (128, 128), ..transform }, &b),
        latents_key(&a, &Transform { size: (64, 128), ..transform }, &b),
        latents_key(&a, &Transform { size: (128, 64), ..transform }, &b),
        prompt_key("a", &b, 77),
    ] {
        assert_ne!(base, other);
    }
    assert_ne!(prompt_key("a", &a, 77), prompt_key("a", &a, 256));
    assert_ne!(prompt_key("a", &a, 77), prompt_key("a ", &a, 77));
    assert_ne!(prompt_key("a", &a, 77), prompt_key("a", &b, 77));
}
